"""Conflict-averse gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import GramianWeightedAggregator, GramWeighting
from fastmtl.linalg import normalized
from fastmtl.support.settings import Through, at_least

__all__ = ["CAGrad", "CAGradWeighting"]


class CAGradWeighting(GramWeighting):
    """Weights of CAGrad's update; see :func:`fastmtl.ops.cagrad_update`.

    Args:
        c: Radius around the mean gradient, relative to its length.
        norm_eps: Where the trace of G is below it, or |g_w| of the G divided by its trace, all weights are zero.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021.
    """

    settings = ("c", "norm_eps")
    c = at_least(0.0)
    norm_eps = at_least(0.0)

    def __init__(self, c: float, norm_eps: float = 0.0001) -> None:
        super().__init__()
        self.c = c
        self.norm_eps = norm_eps

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights."""
        matrix = normalized(gram, self.norm_eps)
        weights, update = ops.cagrad_update(matrix, self.c).unbind()
        length = (weights @ matrix @ weights).clamp(min=0).sqrt()
        return torch.where(length < self.norm_eps, 0.0, update)


class CAGrad(GramianWeightedAggregator):
    """The direction near the mean gradient that is best for the worst task; see :class:`CAGradWeighting`."""

    settings = ("c", "norm_eps")
    gramian_weighting: CAGradWeighting
    c: Through[float] = Through()
    norm_eps: Through[float] = Through()

    def __init__(self, c: float, norm_eps: float = 0.0001) -> None:
        super().__init__(CAGradWeighting(c, norm_eps))

    def __str__(self) -> str:
        return f"CAGrad{str(self.c).removesuffix('.0')}"
