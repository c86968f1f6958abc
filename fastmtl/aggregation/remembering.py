"""Aggregators that remember something from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from fastmtl.support.settings import Declared, Setting, setting, state
from fastmtl.support.stateful import Stateful
from fastmtl.weighting.PCD import descend_by_priority
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
        n_warmup_steps: Calls before the weights start to move; those with NaN or infinity are counted too.

    Source: He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024.
    """

    needs_rows_only = False
    robust_step_size: float = setting(default=1.0, above=0)
    n_warmup_steps: int = setting(default=0, least=0)
    _weights: Tensor | None = state()
    _sq_grad_sum: Tensor | None = state()
    _initial_w: Tensor | None = state()
    _warmup_w_sum: Tensor | None = state()
    _finite_calls: Tensor | None = state()

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the weights and remember the squares of the gradients."""
        sums, last = self.begin(_sq_grad_sum=matrix.new_zeros(1).expand_as(matrix), _weights=equal_weights(matrix))
        finite = matrix.isfinite().all()
        # The op adds to the sums in place; zeros leave them unchanged.
        risks = ops.excess_risk_(sums, torch.where(finite, matrix, 0.0)).to(matrix.dtype)
        self._calls += 1
        if self._calls <= self.n_warmup_steps:
            self._warmup_w_sum = risks if self._warmup_w_sum is None else self._warmup_w_sum + risks
            self._finite_calls = finite.long() if self._finite_calls is None else self._finite_calls + finite
            return torch.where(finite, last, torch.nan)
        if self._initial_w is None and self._warmup_w_sum is not None and self._finite_calls is not None:
            self._initial_w = self._warmup_w_sum / self._finite_calls
        if self._initial_w is None:
            self._initial_w = torch.full_like(risks, torch.nan)
        # NaN marks risks that are not known yet.
        first = self._initial_w.isnan()
        relative = torch.where(first, risks, risks / (self._initial_w + 1e-7))
        weights = torch.where(finite, raised(last, relative, self.robust_step_size), torch.nan)
        self.learn(_weights=weights, _initial_w=torch.where(first, risks, self._initial_w))
        return weights

    def reset(self) -> None:
        """Forget the squares, the first risks and the weights."""
        super().reset()
        self._calls = 0


class ExcessMTL(Declared, WeightedAggregator[ExcessMTLWeighting], Remembering, of=ExcessMTLWeighting):
    """A weighted sum in which tasks far from their optimum count more; see :class:`ExcessMTLWeighting`."""

    robust_step_size: float = ExcessMTLWeighting.robust_step_size
    n_warmup_steps: int = ExcessMTLWeighting.n_warmup_steps


class GradVacWeighting(GramWeighting, Buffered):
    """Weights of Gradient Vaccine's update, in a new random order at each call; see :func:`fastmtl.ops.gradvac`.

    Args:
        beta: Weight of a new cosine in the moving average, 0 to 1.
        eps: At least 0. Has no effect; TorchJD adds it to divisors.

    Source: Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
    Multilingual Models", ICLR 2021.
    """

    beta: float = setting(default=0.5, least=0, most=1)
    eps: float = setting(default=1e-8, least=0)
    _phi_t: Tensor | None = state()

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the sums of the raised gradients' coefficients; another number of tasks starts anew."""
        (last,) = self.begin(_phi_t=torch.zeros_like(gram))
        weights, cosines = ops.gradvac(gram, torch.rand_like(gram), last, self.beta)
        self.learn(_phi_t=cosines)
        return weights


class GradVac(Declared, GramianWeightedAggregator[GradVacWeighting], Remembering, of=GradVacWeighting):
    """The sum of the gradients, each turned towards the others where it was closer; see :class:`GradVacWeighting`."""

    beta: float = GradVacWeighting.beta
    eps: float = GradVacWeighting.eps


class NashMTLWeighting(MatrixWeighting, Stateful):
    """Weights of the Nash bargaining solution; see :func:`fastmtl.ops.nash`.

    Args:
        n_tasks: T.
        max_norm: Greatest length of the update; 0 for none.
        update_weights_every: Calls between two bargains; the weights are kept in between.
        optim_niter: Has no effect, as the solution is exact; TorchJD has it.

    Raises:
        UsageError: The matrix has another number of rows.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022.
    """

    needs_rows_only = False
    takes_groups = True
    n_tasks: int = setting(above=0)
    max_norm: float = setting(default=1.0, least=0)
    update_weights_every: int = setting(default=1, above=0)
    optim_niter: int = setting(default=20, above=0)

    def reset(self) -> None:
        """Forget the last weights and the number of calls."""
        self._last: Tensor | None = None
        self._calls = 0

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the bargain's weights, in the dtype of ``matrix``."""
        return self.weigh(gram_of([matrix])).to(matrix.dtype)

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the bargain's weights of a float64 Gram matrix, at most as long an update as ``max_norm``.

        With those of L groups, (L, T, T), the weights are (L, T), and the update is that of all groups. Another number
        of groups starts anew. A Gram matrix with NaN or infinity gives NaN weights, which later calls do not use.
        """
        if gram.shape[-1] != self.n_tasks:
            raise UsageError(f"matrix must have n_tasks={self.n_tasks} rows, got {gram.shape[-1]}.")
        if self._last is not None and self._last.shape != gram.shape[:-1]:
            self.reset()
        weights = last = torch.ones_like(gram[..., 0, :]) if self._last is None else self._last.to(gram)
        if self._last is None or self._calls % self.update_weights_every == 0:
            weights = ops.nash(gram, last)
            self._last = torch.where(weights.isfinite().all(-1, keepdim=True), weights, last)
        self._calls += 1
        if self.max_norm == 0:
            return weights
        length = torch.einsum("...s,...st,...t->...", weights, gram, weights).sum().clamp(min=0).sqrt()
        return weights * (self.max_norm / torch.where(length > 0, length, 1.0)).clamp(max=1)


class NashMTL(Declared, WeightedAggregator[NashMTLWeighting], Remembering, of=NashMTLWeighting):
    """The Nash bargaining solution between the tasks; see :class:`NashMTLWeighting`."""

    n_tasks: int
    max_norm: float = NashMTLWeighting.max_norm
    update_weights_every: int = NashMTLWeighting.update_weights_every
    optim_niter: int = NashMTLWeighting.optim_niter

    def works_on_gram(self) -> bool:
        """Return whether nothing needs the (T, P) Jacobian."""
        return self.is_plain()

    def takes_groups(self) -> bool:
        """Return whether nothing needs the (T, P) Jacobian: what is remembered is of each group."""
        return self.is_plain()

    def weights_of_gram(self, gram: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights from the Gram matrix; see :meth:`Aggregator.weights_of_gram`."""
        return self.weighting.weigh(gram)

    def _weights_of(self, jacobians: Sequence[Tensor]) -> Tensor:
        return self.weighting.weigh(gram_of(jacobians))


def _shares(default: float) -> Any:
    """Declare a setting that is a number from 0 to 1, or a vector of them."""

    def allowed(value: float | Tensor) -> bool:
        shares = torch.as_tensor(value)
        return shares.dim() <= 1 and bool(((shares >= 0) & (shares <= 1)).all())

    return Setting(default, allowed, "from 0 to 1, a number or a vector")


class PCDWeighting(GramWeighting, Buffered):
    """Weights of the update closest to the first task's gradient that lets every other task make progress.

    With ``s_i = 1 / sqrt(v_i + eps)``, v_i a moving average of ``|g_i|^2`` without its bias, and ``n_i = s_i g_i``: the
    d closest to n_1 under ``<n_j, d> >= tau_j |n_j|^2`` for all others, as long as g_1. If no such d exists, it is g_1.

    Args:
        tau: Share of its own progress every other task gets, 0 to 1; or T - 1 of them.
        beta: Decay of the moving average, from 0 to below 1.
        eps: Added to the average, at least 0.

    Raises:
        UsageError: ``tau`` has not one entry per other task.

    Source: "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
    Optimization", TMLR 2026.
    """

    tau: float | Tensor = _shares(default=0.02)
    beta: float = setting(default=0.999, least=0, below=1)
    eps: float = setting(default=1e-8, least=0)
    _sq_norm_ema: Tensor | None = state()
    _n_steps: Tensor | None = state()

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the constrained descent's weights; another number of tasks starts anew."""
        tau = self.tau
        if isinstance(tau, Tensor):
            if len(tau) != len(gram) - 1:
                raise UsageError(f"tau must have {len(gram) - 1} entries, one per other task, got {len(tau)}.")
            tau = tau.to(gram)
        average, steps = self.begin(_sq_norm_ema=torch.zeros_like(gram[0]), _n_steps=torch.zeros_like(gram[0, 0]))
        weights, average, steps = descend_by_priority(gram, average, steps, tau=tau, beta=self.beta, eps=self.eps)
        self.learn(_sq_norm_ema=average, _n_steps=steps)
        return weights


class PCD(Declared, GramianWeightedAggregator[PCDWeighting], Remembering, of=PCDWeighting):
    """The first task's gradient, as long as the others make progress too; see :class:`PCDWeighting`."""

    tau: float | Tensor = PCDWeighting.tau
    beta: float = PCDWeighting.beta
    eps: float = PCDWeighting.eps
