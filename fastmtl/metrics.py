"""Metrics of tasks, accumulated on the device and read once per epoch.

Example::

    class Recall(AbsMetric):
        def update_fun(self, pred, gt):
            self.record.append(((pred > 0) & gt).sum())
            self.bs.append(gt.sum())

        def score_fun(self):
            return [(sum(self.record) / sum(self.bs)).item()]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.running import RunningMean

__all__ = ["AbsMetric", "AccMetric", "L1Metric"]


class AbsMetric:
    """Base of all metrics: override ``update_fun`` and ``score_fun``, and ``reinit`` if there is further state.

    Attributes:
        record: For subclasses: whatever they keep of each batch.
        bs: For subclasses: the batch sizes.
    """

    def __init__(self) -> None:
        self.record: Any = []
        self.bs: Any = []

    def update_fun(self, pred: Any, gt: Any) -> None:
        """Take in one batch of predictions and labels, both ``(batch, ...)``; called without gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define update_fun(pred, gt)")

    def score_fun(self) -> list[float]:
        """Return the scores of all batches since ``reinit``, one per metric name of the task."""
        raise NotImplementedError(f"{type(self).__name__} must define score_fun()")

    def reinit(self) -> None:
        """Forget all batches."""
        self.record = []
        self.bs = []


class _MeanMetric(AbsMetric):
    def __init__(self) -> None:
        super().__init__()
        self._running = RunningMean()

    def score_fun(self) -> list[float]:
        """Return the mean as a list of one; waits for the device.

        Raises:
            UsageError: There was no batch.
        """
        if self._running.empty:
            raise UsageError(f"{type(self).__name__} has no batch to score: is the data loader empty?")
        return [self._running.value()]

    def reinit(self) -> None:
        """Forget all batches."""
        super().reinit()
        self._running.reset()


class AccMetric(_MeanMetric):
    """Accuracy: the share of labels ``gt`` (any shape) equal to the arg max of ``pred`` ``(*gt.shape, classes)``."""

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Count the right predictions of one batch."""
        if gt.numel():
            # The mean of a batch times its count is not exact in float32, the count of right ones is.
            self._running.add_sum(pred.argmax(-1).eq(gt).sum(), gt.numel())


class L1Metric(_MeanMetric):
    """Mean absolute error, each batch's mean weighted by its size."""

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Take in the mean absolute error of one batch."""
        self._running.add((pred - gt).abs().mean(), pred.shape[0])
