"""The run as a table of numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from typing_extensions import override

from fastmtl.trainer.log.files import FileLogger
from fastmtl.trainer.log.logger import RunInfo, StepRecords
from fastmtl.trainer.log.scalars import of_epoch, of_steps

__all__ = ["CsvLogger"]

_COLUMNS = ("epoch", "step", "tag", "value")


class CsvLogger(FileLogger):
    """Writes a row ``epoch,step,tag,value`` per number; tags are those of TensorBoard, ``step`` counts steps done.

    Every row is flushed. When a run goes on, the rows of steps that will be done again are dropped. The file is
    usually a ``metrics.csv``.
    """

    @override
    def on_steps(self, records: StepRecords) -> None:
        if self._info is not None:
            self._write(records.epoch, records.first_step + records.count, of_steps(records, self._info))

    @override
    def on_epoch(
        self, epoch: int, mode: str, losses: dict[str, float], metrics: dict[str, list[float]], seconds: float
    ) -> None:
        if self._info is not None:
            values = of_epoch(mode, losses, metrics, self._info)
            self._write(epoch, (epoch + 1) * self._info.batches_per_epoch, values)

    @override
    def _begun(self, info: RunInfo) -> str:
        rows: list[list[str]] = []
        if info.start_step and self.path.exists():
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS)][1:]
        return _text([_COLUMNS, *(row for row in rows if row[1].isdigit() and int(row[1]) <= info.start_step)])

    def _write(self, epoch: int, step: int, values: dict[str, float]) -> None:
        self._append(_text([epoch, step, tag, f"{value:.7g}"] for tag, value in values.items()))


def _text(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
