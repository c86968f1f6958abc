"""The run as TensorBoard events."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from fastmtl.errors import UsageError
from fastmtl.trainer.log.logger import Logger, RunInfo, StepRecords

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger(Logger):
    """Writes means over each log interval and the results of each epoch as TensorBoard scalars.

    Tags are ``step_loss/<task>``, ``step_weight/<task>``, ``step_norm/<task>``, ``step_cosine/<a>:<b>`` and
    ``steps_per_second``, with float16 ``loss_scale`` and ``skipped_steps``; ``<mode>_loss/<task>`` and
    ``<mode>_<metric>/<task>`` for the epochs. The x axis of all is the number of training steps done. Needs the
    package tensorboard.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as cause:
            raise UsageError(
                f"TensorBoard events need the package tensorboard (pip install tensorboard): {cause}."
            ) from cause
        self.directory = Path(directory)
        self._writer_class = SummaryWriter
        self._writer: SummaryWriter | None = None
        self._info: RunInfo | None = None

    @override
    def on_start(self, info: RunInfo) -> None:
        self._info = info
        # TensorBoard hides the earlier events from purge_step on: those steps will be done again.
        purge_step = info.start_step + 1 if info.start_step else None
        self._writer = self._writer_class(str(self.directory), purge_step=purge_step)

    @override
    def on_steps(self, records: StepRecords) -> None:
        if self._writer is None or self._info is None:
            return
        step = records.first_step + records.count
        for group, values in records.means(self._info.task_names).items():
            _add(self._writer, f"step_{group}", values, step)
        self._writer.add_scalar("steps_per_second", records.steps_per_second, step)
        if records.loss_scale is not None:
            self._writer.add_scalar("loss_scale", records.loss_scale, step)
            self._writer.add_scalar("skipped_steps", records.skipped, step)

    @override
    def on_epoch(
        self, epoch: int, mode: str, losses: dict[str, float], metrics: dict[str, list[float]], seconds: float
    ) -> None:
        if self._writer is None or self._info is None:
            return
        step = (epoch + 1) * self._info.batches_per_epoch
        _add(self._writer, f"{mode}_loss", losses, step)
        for task, values in metrics.items():
            for name, value in zip(self._info.metric_names[task], values, strict=True):
                _add(self._writer, f"{mode}_{name}", {task: value}, step)
        self._writer.flush()

    @override
    def on_end(self, best_epoch: int, best_result: dict[str, list[float]]) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _add(writer: SummaryWriter, group: str, values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        if math.isfinite(value):
            writer.add_scalar(f"{group}/{name}", value, step)
