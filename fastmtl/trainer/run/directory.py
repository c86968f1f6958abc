"""The folder of one training run: where each of its files lies, and what was printed while it ran."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

from fastmtl.errors import UsageError

__all__ = ["RunDirectory", "Tee", "write_atomically"]


class RunDirectory:
    """The files of a run: its configuration, checkpoints, metrics, curves, trace, log, facts of the model and card."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.facts = self.path / "model.json"
        self.card = self.path / "README.md"
        self.best = self.path / "best.pt"
        self.last = self.path / "last.pt"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.curves = self.path / "curves.png"
        self.trace = self.path / "trace.json"
        self.log = self.path / "train.log"

    @classmethod
    def create(cls, path: str | Path) -> RunDirectory:
        """Make the folder `path`, or take it if it holds no run.

        Raises:
            UsageError: It holds a run, or cannot be made.
        """
        run = cls(path)
        held = next((file for file in (run.last, run.best, run.config, run.metrics) if file.exists()), None)
        if held is not None:
            raise UsageError(
                f"{run.path} already holds a run ({held.name}): go on with it (fastmtl train --resume {run.path}) or "
                f"name another folder."
            )
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise UsageError(f"The run directory {run.path} cannot be made: {cause.strerror}.") from cause
        run.check_writable()
        return run

    @classmethod
    def create_again(cls, path: str | Path) -> RunDirectory:
        """Take a folder whose run ended before it saved anything."""
        run = cls(path)
        for file in (run.config, run.metrics, run.facts):
            file.unlink(missing_ok=True)
        return cls.create(path)

    @classmethod
    def create_named(
        cls, dataset: str, arch: str, weighting: str, now: datetime, root: str | Path = "runs"
    ) -> RunDirectory:
        """Make ``<root>/<dataset>-<arch>-<weighting>-<YYYYmmdd-HHMMSS>``, with a number behind it if that is taken.

        Raises:
            UsageError: The folder cannot be made.
        """
        name = f"{dataset}-{arch}-{weighting}-{now:%Y%m%d-%H%M%S}".lower()
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            for count in range(1, 1000):
                path = Path(root) / (name if count == 1 else f"{name}-{count}")
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    return cls(path)
        except OSError as cause:
            raise UsageError(f"A run directory in {root} cannot be made: {cause.strerror}.") from cause
        raise UsageError(f"{Path(root) / name} and its numbered names are all taken: name another folder.")

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Return the run in `path`.

        Raises:
            UsageError: There is no such folder, or it has no ``config.yaml``.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise UsageError(f"There is no run directory {run.path}.")
        if not run.config.exists():
            raise UsageError(f"{run.path} is not a run directory: it has no {run.config.name}.")
        return run

    def check_writable(self) -> None:
        """Find out now what would else be found out when the first checkpoint is written.

        Raises:
            UsageError: The folder cannot be written to, or a folder lies where a file has to be.
        """
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UsageError(f"The run directory {self.path} cannot be written to.")
        files = (
            self.config,
            self.facts,
            self.card,
            self.best,
            self.last,
            self.metrics,
            self.curves,
            self.trace,
            self.log,
        )
        for file in files:
            for path in (file, part_of(file)):
                if path.is_dir():
                    raise UsageError(f"The run directory {self.path} needs {path.name} as a file, but it is a folder.")

    def discard(self) -> None:
        """Take away a run that never began: its log, and its folder if nothing else is in it."""
        self.log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()


def part_of(path: Path) -> Path:
    """Return the file that what will be ``path`` is written to first."""
    return path.with_name(path.name + ".part")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that whoever reads it finds the old text or the new one, never a part."""
    part = part_of(path)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class Tee:
    """A text stream whose lines also go to a file; it may be replaced while text is written, as a progress bar does."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self.stream = stream
        self.log = log

    def write(self, text: str) -> int:
        """Write to both."""
        self.log.write(text)
        self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush both."""
        self.log.flush()
        self.stream.flush()

    def isatty(self) -> bool:
        """Whether the text is shown on a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """File descriptor of the shown stream."""
        return self.stream.fileno()

    @property
    def encoding(self) -> str:
        """Encoding of the shown stream."""
        return self.stream.encoding

    @classmethod
    @contextlib.contextmanager
    def recording(cls, path: Path) -> Iterator[None]:
        """Append what is printed on stdout and stderr to the file `path` for the length of a ``with`` block."""
        shown = sys.stdout, sys.stderr
        with path.open("a", encoding="utf-8", buffering=1) as log:
            sys.stdout, sys.stderr = cls(shown[0], log), cls(shown[1], log)
            try:
                yield
            finally:
                sys.stdout, sys.stderr = shown
