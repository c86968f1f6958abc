"""Gradient vaccine."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import GramianWeightedAggregator, GramWeighting, Remembering
from fastmtl.support.settings import Setting, Through, at_least
from fastmtl.support.stateful import Stateful

__all__ = ["GradVac", "GradVacWeighting"]


class GradVacWeighting(GramWeighting, Stateful):
    """Weights of Gradient Vaccine's update, in a new random order at each call; see :func:`fastmtl.ops.gradvac`.

    Args:
        beta: Weight of a new cosine in the moving average, 0 to 1.
        eps: At least 0. What TorchJD adds to what it divides by; nothing is added here.

    Source: Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
    Multilingual Models", ICLR 2021.
    """

    beta: Setting[float] = Setting(lambda value: 0 <= value <= 1, "from 0 to 1")
    eps = at_least(0.0)
    _phi_t: Tensor | None

    def __init__(self, beta: float = 0.5, eps: float = 1e-8) -> None:
        super().__init__()
        self.beta = beta
        self.eps = eps
        self.register_buffer("_phi_t", None)

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights and move the averages; another number of tasks starts anew."""
        if self._phi_t is None or self._phi_t.shape != gram.shape:
            self._phi_t = torch.zeros_like(gram)
        weights, self._phi_t = ops.gradvac(gram, torch.rand_like(gram), self._phi_t.to(gram), self.beta)
        return weights

    def reset(self) -> None:
        """Forget the averages."""
        self._phi_t = None


class GradVac(GramianWeightedAggregator, Remembering):
    """The sum of the gradients, each turned towards the others where it was closer before.

    See :class:`GradVacWeighting`.
    """

    gramian_weighting: GradVacWeighting
    beta: Through[float] = Through()
    eps: Through[float] = Through()

    def __init__(self, beta: float = 0.5, eps: float = 1e-8) -> None:
        super().__init__(GradVacWeighting(beta, eps))
