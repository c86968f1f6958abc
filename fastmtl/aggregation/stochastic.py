"""Weightings of the products J_1 J_2^T of two independent batches' gradients, and weights smoothed over the steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.aggregation.base import Buffered, MatrixWeighting, Weighting
from fastmtl.aggregation.constant import equal_weights
from fastmtl.errors import UsageError
from fastmtl.support.settings import Declared, setting, state, vector
from fastmtl.support.stateful import Stateful
from fastmtl.weighting.rules import directed_weights, stepped

__all__ = ["CRMOGMWeighting", "MoDoWeighting", "SDMGradWeighting"]


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
    gamma: float = setting(default=0.1, above=0)
    rho: float = setting(default=0.1, least=0)
    _lambda: Tensor | None = state()

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the weights after this call's step; another number of tasks starts anew."""
        (last,) = self.begin(_lambda=equal_weights(matrix))
        weights = stepped(last, matrix, self.gamma, self.rho)
        self.learn(_lambda=weights)
        return weights


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
    lr: float = setting(default=10.0, above=0)
    momentum: float = setting(default=0.5, least=0, below=1)
    n_iter: int = setting(default=20, least=1)
    lambda_: float = setting(default=0.3, least=0)
    pref_vector: Tensor | None = vector(default=None)
    _w: Tensor | None = state()

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the solver's weights, pulled towards the preferred ones; another number of tasks starts anew."""
        preference = equal_weights(matrix) if self.pref_vector is None else self.pref_vector.to(matrix)
        if len(preference) != len(matrix):
            raise UsageError(f"pref_vector must have {len(matrix)} entries, one per row, got {len(preference)}.")
        (last,) = self.begin(_w=equal_weights(matrix))
        weights = directed_weights(
            last,
            matrix,
            preference,
            lamda=self.lambda_,
            rate=self.lr,
            momentum=self.momentum,
            steps=self.n_iter,
        )
        self.learn(_w=weights)
        return (weights + self.lambda_ * preference) / (1 + self.lambda_)


class CRMOGMWeighting(Declared, Weighting[Any], Buffered):
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
    alpha: float = setting(least=0, most=1)
    _lambda: Tensor | None = state()

    def __init__(self, weighting: Weighting[Any], alpha: float = 0.9, initial_weights: Tensor | None = None) -> None:
        super().__init__()
        self.weighting = weighting
        self.alpha = alpha
        self._initial_weights = initial_weights
        super().reset()

    def forward(self, stat: Tensor, /) -> Tensor:
        """Return the moving average of the weights."""
        fresh: Tensor = self.weighting(stat)
        last = self._lambda
        if last is None:
            last = (
                torch.full_like(fresh, torch.nan) if self._initial_weights is None else self._initial_weights.to(fresh)
            )
            if last.shape != fresh.shape:
                raise UsageError(f"initial_weights must have the shape {tuple(fresh.shape)}, got {tuple(last.shape)}.")
            self._lambda = last
        elif last.shape != fresh.shape:
            raise UsageError(
                f"The number of objectives must stay {len(last)} until reset() is called, got {len(fresh)}."
            )
        # NaN marks weights that are not known yet.
        average = self.alpha * torch.where(last.isnan(), fresh, last) + (1 - self.alpha) * fresh
        self.learn(_lambda=average)
        return average

    def reset(self) -> None:
        """Forget the average, and what the other weighting remembers."""
        super().reset()
        if isinstance(self.weighting, Stateful):
            self.weighting.reset()
