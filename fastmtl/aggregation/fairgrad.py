"""Fair resource allocation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import GramianWeightedAggregator, GramWeighting
from fastmtl.support.settings import Through, at_least

__all__ = ["FairGrad", "FairGradWeighting"]


class FairGradWeighting(GramWeighting):
    """Weights w > 0 with ``G w = w^(-1/alpha)``; see :func:`fastmtl.ops.fairgrad`.

    Args:
        alpha: Fairness, at least 0: 0 is the mean, 1 proportional, towards infinity max-min.
        max_iters: Taken for TorchJD's sake; the solution is exact.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024.
    """

    settings = ("alpha", "max_iters")
    alpha = at_least(0.0)

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        super().__init__()
        self.alpha = alpha
        self.max_iters = max_iters

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights."""
        if self.alpha == 0:
            return torch.full_like(gram[0], 1 / len(gram))
        return ops.fairgrad(gram, self.alpha)


class FairGrad(GramianWeightedAggregator):
    """The alpha-fair update; see :class:`FairGradWeighting`."""

    settings = ("alpha", "max_iters")
    gramian_weighting: FairGradWeighting
    alpha: Through[float] = Through()
    max_iters: Through[int | None] = Through()

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        super().__init__(FairGradWeighting(alpha, max_iters))

    def __str__(self) -> str:
        return f"{self.alpha}-FairGrad"
