"""Bargaining between tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import MatrixWeighting, Remembering, WeightedAggregator
from fastmtl.aggregation.rows import gram_of
from fastmtl.errors import UsageError
from fastmtl.support.settings import Through, at_least, positive
from fastmtl.support.stateful import Stateful

__all__ = ["NashMTL", "NashMTLWeighting"]


class NashMTLWeighting(MatrixWeighting, Stateful):
    """Weights of the Nash bargaining solution; see :func:`fastmtl.ops.nash`.

    Args:
        n_tasks: T.
        max_norm: Greatest length of the update; 0 for none.
        update_weights_every: Calls between two bargains; the weights are kept in between.
        optim_niter: Taken for TorchJD's sake; the solution is exact.

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
        """Return the weights of a float64 Gram matrix.

        Raises:
            UsageError: It has another number of tasks.
        """
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


class NashMTL(WeightedAggregator, Remembering):
    """The Nash bargaining solution between the tasks; see :class:`NashMTLWeighting`."""

    weighting: NashMTLWeighting
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
