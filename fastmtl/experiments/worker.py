"""The process of one cell: it waits until the run folder is its own, then starts the run or goes on with it.

``python -m fastmtl.experiments.worker train CONFIG RUN DEVICE`` runs `fastmtl train`;
``... program PROGRAM METHOD CONFIG RUN DEVICE`` runs a cell of :func:`fastmtl.compare`. Its standard input is a pipe
that nobody writes to: when it closes, the process that started this one has died, and this one ends too, so that no run
is left working in a folder where the experiment is about to go on.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["ORPHANED", "work"]

ORPHANED = 75


def work(words: Sequence[str]) -> int:
    """Do what the command line says; return the exit code of the run.

    Raises:
        FastmtlError: A cell of a program cannot be as asked.
    """
    kind, *rest = words
    run = Path(rest[-2])
    with _alone_in(run):
        goes_on = (run / "last.pt").exists()
        if not goes_on and run.exists():
            # It ended before its first checkpoint.
            shutil.rmtree(run)
        if kind == "program":
            from fastmtl.experiments.program import run_cell

            program, method, config, _, device = rest
            run_cell(Path(program), method, Path(config), run, device, goes_on=goes_on)
            return 0
        config, _, device = rest
        start = ["--resume", str(run)] if goes_on else ["--config", config, "--run-dir", str(run)]
        return _command(["train", *start, *(["--device", device] if device else [])])


def _command(arguments: Sequence[str]) -> int:
    """Run the `fastmtl` command in this process."""
    before, sys.argv = sys.argv, ["fastmtl", *arguments]
    try:
        runpy.run_module("fastmtl", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


@contextlib.contextmanager
def _alone_in(run: Path) -> Iterator[None]:
    """Wait for another process to be done with the run folder."""
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / f".{run.name}.lock").open("w") as lock:
        try:
            import fcntl
        except ImportError:
            pass
        else:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _end_with_parent() -> None:
    # No one writes: this returns when the other end is closed. Python's own stream has a lock that its exit needs.
    os.read(0, 1)
    os._exit(ORPHANED)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.argv[1] == "train":
        sys.exit(work(sys.argv[1:]))
    from fastmtl.experiments.program import reporting

    sys.exit(reporting(work, sys.argv[1:]))
