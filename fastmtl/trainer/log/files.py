"""The base of loggers that write a text file."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from typing_extensions import override

from fastmtl.trainer.log.logger import Logger, RunInfo
from fastmtl.trainer.run.directory import write_atomically

__all__ = ["FileLogger"]


class FileLogger(Logger):
    """Writes a run to a file, of which every piece is flushed, so that it is whole whenever the process dies.

    When a run goes on, the file keeps what `_begun` returns. Evaluation outside of ``train()`` has no open run, and is
    not written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None
        self._info: RunInfo | None = None

    @override
    def on_start(self, info: RunInfo) -> None:
        begun = self._begun(info)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, begun)
        # The text has the line ends that it is to have.
        self._file = self.path.open("a", encoding="utf-8", newline="")
        self._info = info

    @override
    def on_end(self, best_epoch: int, best_result: dict[str, list[float]]) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begun(self, info: RunInfo) -> str:
        """Return what the file begins with: of a run that goes on, all but the steps that will be done again."""
        raise NotImplementedError

    def _append(self, text: str) -> None:
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
