"""The run as TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from fastmtl.errors import UsageError
from fastmtl.trainer.log.logger import Logger, RunInfo, StepRecords
from fastmtl.trainer.log.scalars import of_epoch, of_steps

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger(Logger):
    """Writes means over each log interval and the results of each epoch as TensorBoard scalars.

    Tags are ``step_loss/<task>``, ``step_weight/<task>``, ``step_norm/<task>``, ``step_cosine/<a>:<b>`` and
    ``steps_per_second``, with groups of parameters ``group_weight/<group>/<task>`` and ``group_conflict/<group>``, with
    float16 ``loss_scale`` and ``skipped_steps``; ``<mode>_loss/<task>`` and
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
        _add(self._writer, of_steps(records, self._info), step)

    @override
    def on_epoch(
        self, epoch: int, mode: str, losses: dict[str, float], metrics: dict[str, list[float]], seconds: float
    ) -> None:
        if self._writer is None or self._info is None:
            return
        step = (epoch + 1) * self._info.batches_per_epoch
        _add(self._writer, of_epoch(mode, losses, metrics, self._info), step)
        self._writer.flush()

    @override
    def on_end(self, best_epoch: int, best_result: dict[str, list[float]]) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _add(writer: SummaryWriter, values: dict[str, float], step: int) -> None:
    for tag, value in values.items():
        writer.add_scalar(tag, value, step)
