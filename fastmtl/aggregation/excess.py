"""Robust multi-task learning with excess risks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import MatrixWeighting, Remembering, WeightedAggregator
from fastmtl.aggregation.constant import equal_weights
from fastmtl.support.settings import Through, at_least, positive
from fastmtl.support.stateful import Stateful
from fastmtl.weighting.rules import raised

__all__ = ["ExcessMTL", "ExcessMTLWeighting"]


class ExcessMTLWeighting(MatrixWeighting, Stateful):
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
        for name in ("_weights", "_sq_grad_sum", "_initial_w", "_warmup_w_sum"):
            self.register_buffer(name, None)
        self._calls = 0

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the weights and remember the squares of the gradients."""
        weights, sums = self._state_for(matrix)
        risks = ops.excess_risk_(sums, matrix).to(matrix.dtype)
        self._calls += 1
        if self._calls <= self.n_warmup_steps:
            self._warmup_w_sum = risks if self._warmup_w_sum is None else self._warmup_w_sum + risks
            return weights.clone()
        if self._initial_w is not None:
            risks = risks / (self._initial_w + 1e-7)
        elif self._warmup_w_sum is not None:
            self._initial_w = self._warmup_w_sum / (self._calls - 1)
            risks = risks / (self._initial_w + 1e-7)
        else:
            self._initial_w = risks
        self._weights = raised(weights, risks, self.robust_step_size)
        return self._weights.clone()

    def _state_for(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        sums, weights = self._sq_grad_sum, self._weights
        if weights is None or sums is None or (sums.shape, sums.dtype) != (matrix.shape, matrix.dtype):
            self.reset()
            self._sq_grad_sum = sums = torch.zeros_like(matrix)
            self._weights = weights = equal_weights(matrix)
        return weights, sums

    def reset(self) -> None:
        """Forget the squares, the first risks and the weights."""
        self._weights = self._sq_grad_sum = self._initial_w = self._warmup_w_sum = None
        self._calls = 0


class ExcessMTL(WeightedAggregator, Remembering):
    """A weighted sum in which tasks far from their optimum count more; see :class:`ExcessMTLWeighting`."""

    weighting: ExcessMTLWeighting
    robust_step_size: Through[float] = Through()
    n_warmup_steps: Through[int] = Through()

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__(ExcessMTLWeighting(robust_step_size, n_warmup_steps))
