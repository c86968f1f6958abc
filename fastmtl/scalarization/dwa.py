"""Dynamic weight average."""

from __future__ import annotations

from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.scalarization.base import Scalarizer
from fastmtl.support.settings import positive
from fastmtl.support.stateful import Stateful
from fastmtl.weighting.rules import descent_rates

__all__ = ["DWA"]


class DWA(Scalarizer, Stateful):
    """A weighted sum in which losses that fall slowly count more.

    From the third epoch on the weights are T times the softmax of ``r / temperature``, r_i the ratio of the mean losses
    of the last two epochs; ones before. Call :meth:`step` at the end of each epoch.

    Args:
        temperature: Positive: the higher, the more equal the weights.

    Raises:
        UsageError: The shape of the losses changed since :meth:`reset`.

    Source: Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019.
    """

    temperature = positive(float)
    _loss_sum: Tensor | None
    _n_batches: int
    _previous_averages: list[Tensor]

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.reset()

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the weighted sum and remember the losses."""
        known = self._loss_sum if not self._previous_averages else self._previous_averages[-1]
        if known is not None and known.shape != values.shape:
            raise UsageError(
                f"values must keep the shape {tuple(known.shape)} until reset() is called, got {tuple(values.shape)}."
            )
        detached = values.detach()
        self._loss_sum = detached.clone() if self._loss_sum is None else self._loss_sum + detached
        self._n_batches += 1
        if len(self._previous_averages) < 2:
            return values.sum()
        older, newer = self._previous_averages
        weights = descent_rates(newer.flatten(), older.flatten(), self.temperature)
        return (weights.reshape(values.shape) * values).sum()

    def step(self) -> None:
        """End the epoch."""
        if self._loss_sum is not None:
            self._previous_averages = [*self._previous_averages, self._loss_sum / self._n_batches][-2:]
        self._loss_sum = None
        self._n_batches = 0

    def reset(self) -> None:
        """Forget all losses."""
        self._loss_sum = None
        self._n_batches = 0
        self._previous_averages = []
