"""Gradient surgery."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import GramianWeightedAggregator, GramWeighting

__all__ = ["PCGrad", "PCGradWeighting"]


class PCGradWeighting(GramWeighting):
    """Weights of PCGrad's update, in a new random order of the tasks at each call; see :func:`fastmtl.ops.pcgrad`.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.
    """

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights."""
        return ops.pcgrad(gram, torch.rand_like(gram))


class PCGrad(GramianWeightedAggregator):
    """The sum of the gradients, each projected off those it conflicts with; see :class:`PCGradWeighting`."""

    def __init__(self) -> None:
        super().__init__(PCGradWeighting())
