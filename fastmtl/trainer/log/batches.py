"""Small batches kept for a while, so that their losses and metrics are added up by few operators for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl._loss.base import updates_itself
from fastmtl.engine.labels import is_overridden
from fastmtl.loss import AbsLoss
from fastmtl.metrics import AbsMetric
from fastmtl.support.kinds import Settings
from fastmtl.trainer.log.records import StepLosses

__all__ = ["BatchQueue", "QueuedTask"]

_MOST_BATCHES, _MOST_ENTRIES = 64, 2**16


class QueuedTask(NamedTuple):
    """What was queued of one task.

    Attributes:
        task: Its name.
        losses: (n,) losses of n batches.
        pred: Its predictions (n batch, ...).
        gt: Its labels (n batch, ...).
    """

    task: str
    losses: Tensor
    pred: Tensor
    gt: Tensor


@dataclass(frozen=True, slots=True)
class _Layout:
    """The tensors of a batch: predictions by task, then labels.

    Attributes:
        tasks: The tasks.
        shapes: Shape of each tensor.
        dtypes: Dtype of each.
        devices: Device of each, the same for all.
        alike: The indices of the tensors of each dtype, which are copied together.
    """

    tasks: tuple[str, ...]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    alike: list[list[int]]

    @classmethod
    def of(cls, tasks: tuple[str, ...], tensors: list[Any]) -> _Layout | None:
        """Return the layout of predictions and labels; None if they cannot be queued."""
        if not all(isinstance(tensor, Tensor) and tensor.dim() and tensor.numel() for tensor in tensors):
            return None
        dtypes, devices = [tensor.dtype for tensor in tensors], [tensor.device for tensor in tensors]
        if len(set(devices)) > 1 or sum(tensor.numel() for tensor in tensors) > _MOST_ENTRIES:
            return None
        alike = [[k for k, other in enumerate(dtypes) if other == dtype] for dtype in dict.fromkeys(dtypes)]
        return cls(tasks, [tensor.shape for tensor in tensors], dtypes, devices, alike)

    def fits(self, tasks: tuple[str, ...], tensors: list[Any]) -> bool:
        try:
            return (
                tasks == self.tasks
                and [tensor.shape for tensor in tensors] == self.shapes
                and [tensor.dtype for tensor in tensors] == self.dtypes
                and [tensor.device for tensor in tensors] == self.devices
            )
        except AttributeError:
            return False

    def copied(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return a flat copy of the tensors of each dtype: a loader or network may use their memory again."""
        flat = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors]
        return [torch.cat([flat[k] for k in indices]) for indices in self.alike]

    def parted(self, copies: list[list[Tensor]]) -> list[Tensor]:
        """Return the tensors (n batch, ...) of n copies."""
        tensors = {}
        for indices, flats in zip(self.alike, zip(*copies, strict=True), strict=True):
            rows, start = torch.stack(flats), 0
            for k in indices:
                shape = self.shapes[k]
                tensors[k] = rows[:, start : start + shape.numel()].reshape(-1, *shape[1:])
                start += shape.numel()
        return [tensors[k] for k in range(len(tensors))]


class BatchQueue:
    """Batches of one layout: of the same tasks, shapes and dtypes.

    Only losses and metrics whose sums over rows do not depend on how the rows come in batches are queued: those of this
    package, which a subclass has not changed.

    Args:
        losses: The loss of each task.
        metrics: The metric of each task.
    """

    def __init__(self, losses: Mapping[str, AbsLoss], metrics: Mapping[str, AbsMetric]) -> None:
        self._of_tasks, self._metrics = losses, metrics
        self._addable: dict[str, bool] = {}
        self._layout: _Layout | None = None
        self._losses: list[Tensor] = []
        self._copies: list[list[Tensor]] = []

    def __len__(self) -> int:
        return len(self._losses)

    @property
    def is_full(self) -> bool:
        """Whether it is time to add the batches up."""
        return len(self._losses) >= _MOST_BATCHES

    def put(self, losses: Mapping[str, Tensor], preds: Settings, labels: Settings) -> bool:
        """Copy a batch; return False if it cannot be queued, or not before what is queued is taken."""
        tasks = tuple(losses)
        tensors: list[Any] = [preds.get(task) for task in tasks]
        tensors += [labels.get(task) for task in tasks]
        if self._layout is None or not self._layout.fits(tasks, tensors):
            if not self._losses and all(map(self._adds_rows, tasks)):
                self._layout = _Layout.of(tasks, tensors)
            # The first batch of a layout is for the metrics to see alone: what does not fit them is said at once.
            return False
        vector = losses.vector if isinstance(losses, StepLosses) and losses.vector.shape[0] == len(tasks) else None
        if vector is None:
            values = list(losses.values())
            if any(value.dim() for value in values):
                return False
            vector = torch.stack(values)
        self._losses.append(vector)
        self._copies.append(self._layout.copied(tensors))
        return True

    def take(self) -> Iterator[QueuedTask]:
        """Empty the queue; yield what was in it, task by task."""
        losses, copies, layout = self._losses, self._copies, self._layout
        self._losses, self._copies = [], []
        if not losses or layout is None:
            return
        of_all = torch.stack(losses)
        tensors = layout.parted(copies)
        count = len(layout.tasks)
        for t, task in enumerate(layout.tasks):
            yield QueuedTask(task, of_all[:, t], tensors[t], tensors[count + t])

    def _adds_rows(self, task: str) -> bool:
        if task not in self._addable:
            self._addable[task] = _adds_rows(self._of_tasks[task], self._metrics[task])
        return self._addable[task]


def _adds_rows(loss: AbsLoss, metric: AbsMetric) -> bool:
    """Return whether what a loss and a metric sum up is the same for several batches as for one of all their rows."""
    changed = any(is_overridden(loss, name) for name in ("labelled", "divisor", "accumulate"))
    return not changed and not updates_itself(loss) and getattr(metric, "adds_rows", False)
