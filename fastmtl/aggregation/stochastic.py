"""Weightings of the products J_1 J_2^T of two independent batches' gradients, and weights smoothed over the steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.aggregation.base import Buffered, MatrixWeighting, Weighting
from fastmtl.aggregation.constant import equal_weights
from fastmtl.errors import UsageError
from fastmtl.support.settings import Setting, at_least, optional_vector, positive
from fastmtl.support.stateful import Stateful
from fastmtl.weighting.rules import directed_weights, stepped

__all__ = ["CRMOGMWeighting", "MoDoWeighting", "SDMGradWeighting"]


def _start(last: Tensor | None, matrix: Tensor) -> Tensor:
    """Return the last weights, equal ones if there are none for so many tasks and this dtype."""
    if last is None or (last.shape, last.dtype) != (matrix.shape[:1], matrix.dtype):
        return equal_weights(matrix)
    return last


class MoDoWeighting(MatrixWeighting, Buffered):
    """Min-norm weights, moved by one projected gradient step per call: ``w <- project(w - gamma (A w + rho w))``.

    The matrix A is (T, T), the products of the gradients of two independent batches.

    Args:
        gamma: Learning rate of the weights, positive.
        rho: Regularisation of the weights, at least 0.

    Source: Chen et al., "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
    Conflict-Avoidance", NeurIPS 2023.
    """

    needs_rows_only = False
    kept = ("_lambda",)
    gamma = positive(float)
    rho = at_least(0.0)
    _lambda: Tensor | None

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        self.gamma = gamma
        self.rho = rho
        self.reset()

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the weights; another number of tasks starts anew."""
        self._lambda = stepped(_start(self._lambda, matrix), matrix, self.gamma, self.rho)
        return self._lambda


class SDMGradWeighting(MatrixWeighting, Buffered):
    """Min-norm weights pulled towards a preferred direction, ``(w + lambda_ p) / (1 + lambda_)``.

    The matrix is (T, T), the products of the gradients of two independent batches; w is found by projected gradient
    descent with momentum, from that of the last call.

    Args:
        lr: Learning rate of the solver, positive.
        momentum: Its momentum, from 0 to below 1.
        n_iter: Its steps per call, at least 1.
        lambda_: Pull, at least 0.
        pref_vector: (T,) p; 1 / T if None.

    Raises:
        UsageError: ``pref_vector`` has not one entry per task.

    Source: Xiao, Ban and Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms",
    NeurIPS 2023.
    """

    needs_rows_only = False
    kept = ("_w",)
    lr = positive(float)
    momentum: Setting[float] = Setting(lambda value: 0 <= value < 1, "from 0 to below 1")
    n_iter = at_least(1)
    lambda_ = at_least(0.0)
    pref_vector = optional_vector()
    _w: Tensor | None

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        lambda_: float = 0.3,
        pref_vector: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.momentum = momentum
        self.n_iter = n_iter
        self.lambda_ = lambda_
        self.pref_vector = pref_vector
        self.reset()

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the weights; another number of tasks starts anew."""
        preference = equal_weights(matrix) if self.pref_vector is None else self.pref_vector.to(matrix)
        if len(preference) != len(matrix):
            raise UsageError(f"pref_vector must have {len(matrix)} entries, one per row, got {len(preference)}.")
        self._w = directed_weights(
            _start(self._w, matrix),
            matrix,
            preference,
            lamda=self.lambda_,
            rate=self.lr,
            momentum=self.momentum,
            steps=self.n_iter,
        )
        return (self._w + self.lambda_ * preference) / (1 + self.lambda_)


class CRMOGMWeighting(Weighting[Any], Buffered):
    """A moving average of another weighting's weights: ``w <- alpha w + (1 - alpha) weighting(...)``.

    Args:
        weighting: The other weighting, of a Jacobian or a Gram matrix.
        alpha: Share of the last weights, 0 to 1; near 0 at first and towards 1 as the learning rate falls.
        initial_weights: (T,) weights before the first call; those of the first call if None.

    Raises:
        UsageError: ``initial_weights`` does not fit, or the number of objectives changed.

    Source: Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond", NeurIPS
    2022.
    """

    settings = ()
    kept = ("_lambda",)
    alpha: Setting[float] = Setting(lambda value: 0 <= value <= 1, "from 0 to 1")
    _lambda: Tensor | None

    def __init__(self, weighting: Weighting[Any], alpha: float = 0.9, initial_weights: Tensor | None = None) -> None:
        super().__init__()
        self.weighting = weighting
        self.alpha = alpha
        self._initial_weights = initial_weights
        super().reset()

    def forward(self, stat: Tensor, /) -> Tensor:
        """Return the average."""
        fresh: Tensor = self.weighting(stat)
        last = self._lambda
        if last is None:
            last = fresh if self._initial_weights is None else self._initial_weights.to(fresh)
            if last.shape != fresh.shape:
                raise UsageError(f"initial_weights must have the shape {tuple(fresh.shape)}, got {tuple(last.shape)}.")
        elif last.shape != fresh.shape:
            raise UsageError(
                f"The number of objectives must stay {len(last)} until reset() is called, got {len(fresh)}."
            )
        self._lambda = self.alpha * last + (1 - self.alpha) * fresh
        return self._lambda

    def reset(self) -> None:
        """Forget the average, and what the other weighting remembers."""
        super().reset()
        if isinstance(self.weighting, Stateful):
            self.weighting.reset()
