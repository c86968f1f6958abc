"""Aggregators that remember something from call to call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import (
    Buffered,
    GramianWeightedAggregator,
    GramWeighting,
    MatrixWeighting,
    Remembering,
    WeightedAggregator,
)
from fastmtl.aggregation.constant import equal_weights
from fastmtl.aggregation.rows import gram_of
from fastmtl.errors import UsageError
from fastmtl.support.settings import Setting, Through, at_least, positive
from fastmtl.support.stateful import Stateful
from fastmtl.weighting.PCD import constrained_descent
from fastmtl.weighting.rules import raised

__all__ = [
    "PCD",
    "ExcessMTL",
    "ExcessMTLWeighting",
    "GradVac",
    "GradVacWeighting",
    "NashMTL",
    "NashMTLWeighting",
    "PCDWeighting",
]


class ExcessMTLWeighting(MatrixWeighting, Buffered):
    """Weights that grow with each task's excess risk, estimated from the gradients and the sum of their squares.

    The first call takes the risks as they are; from the second one on they are relative to the first ones, or to their
    mean over ``n_warmup_steps`` calls with equal weights. The weights sum to one. The state is as large as the
    Jacobian; a Jacobian of another shape starts anew.

    Args:
        robust_step_size: Learning rate of the weights, positive.
        n_warmup_steps: Calls before the weights start to move.

    Source: He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024.
    """

    needs_rows_only = False
    kept = ("_weights", "_sq_grad_sum", "_initial_w", "_warmup_w_sum")
    robust_step_size = positive(float)
    n_warmup_steps = at_least(0)
    _weights: Tensor | None
    _sq_grad_sum: Tensor | None
    _initial_w: Tensor | None
    _warmup_w_sum: Tensor | None

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__()
        self.robust_step_size = robust_step_size
        self.n_warmup_steps = n_warmup_steps
        self.reset()

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the weights and remember the squares of the gradients."""
        sums, weights = self._sq_grad_sum, self._weights
        if weights is None or sums is None or (sums.shape, sums.dtype) != (matrix.shape, matrix.dtype):
            self.reset()
            self._sq_grad_sum = sums = torch.zeros_like(matrix)
            self._weights = weights = equal_weights(matrix)
        risks = ops.excess_risk_(sums, matrix).to(matrix.dtype)
        self._calls += 1
        if self._calls <= self.n_warmup_steps:
            self._warmup_w_sum = risks if self._warmup_w_sum is None else self._warmup_w_sum + risks
            return weights.clone()
        if self._initial_w is None and self._warmup_w_sum is not None:
            self._initial_w = self._warmup_w_sum / (self._calls - 1)
        if self._initial_w is None:
            self._initial_w = risks
        else:
            risks = risks / (self._initial_w + 1e-7)
        self._weights = raised(weights, risks, self.robust_step_size)
        return self._weights.clone()

    def reset(self) -> None:
        """Forget the squares, the first risks and the weights."""
        super().reset()
        self._calls = 0


class ExcessMTL(WeightedAggregator[ExcessMTLWeighting], Remembering):
    """A weighted sum in which tasks far from their optimum count more; see :class:`ExcessMTLWeighting`."""

    robust_step_size: Through[float] = Through()
    n_warmup_steps: Through[int] = Through()

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__(ExcessMTLWeighting(robust_step_size, n_warmup_steps))


class GradVacWeighting(GramWeighting, Buffered):
    """Weights of Gradient Vaccine's update, in a new random order at each call; see :func:`fastmtl.ops.gradvac`.

    Args:
        beta: Weight of a new cosine in the moving average, 0 to 1.
        eps: At least 0. What TorchJD adds to what it divides by; nothing is added here.

    Source: Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
    Multilingual Models", ICLR 2021.
    """

    kept = ("_phi_t",)
    beta: Setting[float] = Setting(lambda value: 0 <= value <= 1, "from 0 to 1")
    eps = at_least(0.0)
    _phi_t: Tensor | None

    def __init__(self, beta: float = 0.5, eps: float = 1e-8) -> None:
        super().__init__()
        self.beta = beta
        self.eps = eps
        self.reset()

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights and move the averages; another number of tasks starts anew."""
        if self._phi_t is None or self._phi_t.shape != gram.shape:
            self._phi_t = torch.zeros_like(gram)
        weights, self._phi_t = ops.gradvac(gram, torch.rand_like(gram), self._phi_t.to(gram), self.beta)
        return weights


class GradVac(GramianWeightedAggregator[GradVacWeighting], Remembering):
    """The sum of the gradients, each turned towards the others where it was closer; see :class:`GradVacWeighting`."""

    beta: Through[float] = Through()
    eps: Through[float] = Through()

    def __init__(self, beta: float = 0.5, eps: float = 1e-8) -> None:
        super().__init__(GradVacWeighting(beta, eps))


class NashMTLWeighting(MatrixWeighting, Stateful):
    """Weights of the Nash bargaining solution; see :func:`fastmtl.ops.nash`.

    Args:
        n_tasks: T.
        max_norm: Greatest length of the update; 0 for none.
        update_weights_every: Calls between two bargains; the weights are kept in between.
        optim_niter: Taken for TorchJD's sake; the solution is exact.

    Raises:
        UsageError: The matrix has another number of rows.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022.
    """

    needs_rows_only = False
    n_tasks = positive(int)
    max_norm = at_least(0.0)
    update_weights_every = positive(int)
    optim_niter = positive(int)

    def __init__(
        self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
    ) -> None:
        super().__init__()
        self.n_tasks = n_tasks
        self.max_norm = max_norm
        self.update_weights_every = update_weights_every
        self.optim_niter = optim_niter
        self._last: Tensor | None = None
        self._calls = 0

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the weights, in the dtype of ``matrix``."""
        return self.weigh(gram_of([matrix])).to(matrix.dtype)

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights of a float64 Gram matrix."""
        if len(gram) != self.n_tasks:
            raise UsageError(f"matrix must have n_tasks={self.n_tasks} rows, got {len(gram)}.")
        if self._last is None or self._calls % self.update_weights_every == 0:
            self._last = ops.nash(gram, None if self._last is None else self._last.to(gram))
        self._calls += 1
        weights = self._last.to(gram)
        if self.max_norm == 0:
            return weights
        length = (weights @ gram @ weights).clamp(min=0).sqrt()
        return weights * (self.max_norm / torch.where(length > 0, length, 1.0)).clamp(max=1)

    def reset(self) -> None:
        """Forget the last weights and the number of calls."""
        self._last = None
        self._calls = 0


class NashMTL(WeightedAggregator[NashMTLWeighting], Remembering):
    """The Nash bargaining solution between the tasks; see :class:`NashMTLWeighting`."""

    n_tasks: Through[int] = Through()
    max_norm: Through[float] = Through()
    update_weights_every: Through[int] = Through()
    optim_niter: Through[int] = Through()

    def __init__(
        self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
    ) -> None:
        super().__init__(NashMTLWeighting(n_tasks, max_norm, update_weights_every, optim_niter))

    def _weights_of(self, jacobians: Sequence[Tensor]) -> Tensor:
        return self.weighting.weigh(gram_of(jacobians))


def _is_share(value: float | Tensor) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 and bool(((value >= 0) & (value <= 1)).all())
    return 0 <= value <= 1


class PCDWeighting(GramWeighting, Buffered):
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

    kept = ("_sq_norm_ema", "_n_steps")
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
        self.reset()

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


class PCD(GramianWeightedAggregator[PCDWeighting], Remembering):
    """The first task's gradient, as long as the others make progress too; see :class:`PCDWeighting`."""

    tau: Through[float | Tensor] = Through()
    beta: Through[float] = Through()
    eps: Through[float] = Through()

    def __init__(self, tau: float | Tensor = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(PCDWeighting(tau, beta, eps))
