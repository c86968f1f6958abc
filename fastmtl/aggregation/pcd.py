"""Priority-constrained descent."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.aggregation.base import GramianWeightedAggregator, GramWeighting, Remembering
from fastmtl.errors import UsageError
from fastmtl.support.settings import Setting, Through, at_least
from fastmtl.support.stateful import Stateful
from fastmtl.weighting.PCD import constrained_descent

__all__ = ["PCD", "PCDWeighting"]


def _is_share(value: float | Tensor) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 and bool(((value >= 0) & (value <= 1)).all())
    return 0 <= value <= 1


class PCDWeighting(GramWeighting, Stateful):
    """Weights of the update closest to the first task's gradient that lets every other task make progress.

    With ``s_i = 1 / sqrt(v_i + eps)``, v_i a moving average of ``|g_i|^2`` without its bias, and ``n_i = s_i g_i``: the
    d closest to n_1 under ``<n_j, d> >= tau_j |n_j|^2`` for all others, as long as g_1. If no such d exists, it is g_1.
    A NaN or infinity in G makes all weights NaN and leaves the averages as they are.

    Args:
        tau: Share of its own progress every other task gets, 0 to 1; or T - 1 of them.
        beta: Decay of the moving average, from 0 to below 1.
        eps: Added to the average, at least 0.

    Raises:
        UsageError: ``tau`` has not one entry per other task.

    Source: "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
    Optimization", TMLR 2026.
    """

    tau: Setting[float | Tensor] = Setting(_is_share, "from 0 to 1, a number or a vector")
    beta: Setting[float] = Setting(lambda value: 0 <= value < 1, "from 0 to below 1")
    eps = at_least(0.0)
    _sq_norm_ema: Tensor | None
    _n_steps: Tensor | None

    def __init__(self, tau: float | Tensor = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        self.tau = tau
        self.beta = beta
        self.eps = eps
        self.register_buffer("_sq_norm_ema", None)
        self.register_buffer("_n_steps", None)

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights; another number of tasks starts anew."""
        tau = self.tau
        if isinstance(tau, Tensor):
            if len(tau) != len(gram) - 1:
                raise UsageError(f"tau must have {len(gram) - 1} entries, one per other task, got {len(tau)}.")
            tau = tau.to(gram)
        if self._sq_norm_ema is None or self._n_steps is None or len(self._sq_norm_ema) != len(gram):
            self._sq_norm_ema, self._n_steps = torch.zeros_like(gram[0]), torch.zeros_like(gram[0, 0])
        finite = gram.isfinite().all()
        last, steps = self._sq_norm_ema.to(gram), self._n_steps.to(gram) + 1
        average = self.beta * last + (1 - self.beta) * gram.diagonal().clamp(min=0)
        self._sq_norm_ema = torch.where(finite, average, last)
        self._n_steps = torch.where(finite, steps, steps - 1)
        spread = average / (1 - self.beta**steps) + self.eps
        scale = torch.where(spread > 0, spread.rsqrt(), 0.0)
        return torch.where(finite, constrained_descent(gram, scale, tau), torch.nan)

    def reset(self) -> None:
        """Forget the moving average."""
        self._sq_norm_ema = self._n_steps = None


class PCD(GramianWeightedAggregator, Remembering):
    """The first task's gradient, as long as the others make progress too; see :class:`PCDWeighting`."""

    gramian_weighting: PCDWeighting
    tau: Through[float | Tensor] = Through()
    beta: Through[float] = Through()
    eps: Through[float] = Through()

    def __init__(self, tau: float | Tensor = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(PCDWeighting(tau, beta, eps))
