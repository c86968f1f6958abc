"""The run as a table of numbers."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TextIO

from typing_extensions import override

from fastmtl.trainer.log.logger import Logger, RunInfo, StepRecords
from fastmtl.trainer.log.scalars import of_epoch, of_steps

__all__ = ["CsvLogger"]

_COLUMNS = ("epoch", "step", "tag", "value")


class CsvLogger(Logger):
    """Writes a row ``epoch,step,tag,value`` per number; tags are those of TensorBoard, ``step`` counts steps done.

    Every row is flushed. When a run goes on, the rows of steps that will be done again are dropped. The file is
    usually a ``metrics.csv``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None
        self._info: RunInfo | None = None

    @override
    def on_start(self, info: RunInfo) -> None:
        self._info = info
        kept = self._rows_until(info.start_step) if info.start_step else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8", newline="")
        csv.writer(self._file).writerows([_COLUMNS, *kept])
        self._file.flush()

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
    def on_end(self, best_epoch: int, best_result: dict[str, list[float]]) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, epoch: int, step: int, values: dict[str, float]) -> None:
        if self._file is not None:
            csv.writer(self._file).writerows([epoch, step, tag, f"{value:.7g}"] for tag, value in values.items())
            self._file.flush()

    def _rows_until(self, step: int) -> list[list[str]]:
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(_COLUMNS)][1:]
        return [row for row in rows if row[1].isdigit() and int(row[1]) <= step]
