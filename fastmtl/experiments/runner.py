"""Works off the cells of an experiment: what is done stays, what is half done goes on, what fails says why."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from fastmtl.errors import FastmtlError, UsageError
from fastmtl.experiments.grid import Cell
from fastmtl.experiments.reading import is_finished
from fastmtl.trainer.run.directory import write_atomically

__all__ = ["PROGRAM", "Here", "Pool", "Processes", "Watcher", "failure_of", "only_one", "state_of", "work_off"]

_USAGE, _INTERRUPTED = 2, 130
_LINES_KEPT = 60
# What the cells of `fastmtl.compare` share; an experiment of the command has no such file.
PROGRAM = "program.pkl"


class Watcher(Protocol):
    """Who is told how the cells get on."""

    def begins(self, cell: Cell) -> None:
        """A cell begins or goes on."""

    def ends(self, cell: Cell, reason: str | None) -> None:
        """A cell has ended; with the reason if it has failed."""

    def looks(self) -> None:
        """Some time has passed."""


class Pool(Protocol):
    """Something that runs cells, several at a time."""

    def submit(self, cell: Cell, begins: Callable[[Cell], None]) -> Future[str | None]:
        """Return what will be the reason of a failure, or None; ``begins`` is called when the cell begins."""

    def stop(self) -> None:
        """Let running cells save their state and end."""

    def close(self) -> None:
        """Give everything back."""


def state_of(cell: Cell) -> str:
    """Return ``"done"``, ``"failed"``, ``"half done"`` or ``"new"``."""
    if is_finished(cell.run, cell.config.epochs):
        return "done"
    if cell.failure.exists():
        return "failed"
    return "half done" if (cell.run / "last.pt").exists() else "new"


def failure_of(cell: Cell) -> dict[str, Any] | None:
    """Return why a cell has failed, as ``{"reason": ..., "again": whether another try may end otherwise}``."""
    if not cell.failure.exists():
        return None
    failure: dict[str, Any] = json.loads(cell.failure.read_text(encoding="utf-8"))
    return failure


def work_off(cells: Sequence[Cell], pool: Pool, watcher: Watcher, *, retry: bool = False) -> None:
    """Run all cells that are not done; a failed one is tried again if it may end otherwise, or with ``retry``.

    Raises:
        KeyboardInterrupt: Ctrl-C; the running cells have saved their state.
    """
    waiting: list[Cell] = []
    for cell in cells:
        failure = failure_of(cell)
        if state_of(cell) == "done":
            cell.failure.unlink(missing_ok=True)
        elif failure is None or failure["again"] or retry:
            waiting.append(cell)
    for cell in waiting:
        cell.failure.unlink(missing_ok=True)
        cell.asked.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cell.asked, cell.config.as_yaml())
    running = {pool.submit(cell, watcher.begins): cell for cell in waiting}
    try:
        while running:
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            watcher.looks()
            for future in done:
                cell = running.pop(future)
                watcher.ends(cell, _keep(cell, future.result()))
    except KeyboardInterrupt:
        pool.stop()
        raise


def _keep(cell: Cell, reason: str | None) -> str | None:
    """Write down why a cell has failed, and return it."""
    if reason is None and not is_finished(cell.run, cell.config.epochs):
        reason = "It ended before its last epoch."
    if reason is None:
        return None
    cell.failure.parent.mkdir(parents=True, exist_ok=True)
    # What fastmtl refuses it will refuse again; memory may be free and a device be there the next time.
    again = not reason.startswith(_REFUSED)
    text = reason.removeprefix(_REFUSED)
    write_atomically(cell.failure, json.dumps({"reason": text, "again": again}))
    return text


# In front of reasons that another try would meet again.
_REFUSED = "refused: "


def command_of(cell: Cell, device: str) -> list[str]:
    """Return what the worker is told to do."""
    program = cell.folder / PROGRAM
    if program.exists():
        return ["program", str(program), cell.method.name, str(cell.asked), str(cell.run), device]
    return ["train", str(cell.asked), str(cell.run), device]


class Processes:
    """A process for each cell, at most one at a time on each of the ``slots``, which name a device or are empty.

    ``threads`` is the number of CPU threads of a process.
    """

    def __init__(self, slots: Sequence[str], threads: int) -> None:
        self._threads = threads
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._pool = ThreadPoolExecutor(max_workers=len(slots))
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def submit(self, cell: Cell, begins: Callable[[Cell], None]) -> Future[str | None]:
        """Return what will be the reason of a failure, or None."""
        return self._pool.submit(self._run, cell, begins)

    def _run(self, cell: Cell, begins: Callable[[Cell], None]) -> str | None:
        device = self._free.get()
        try:
            with self._lock:
                if self._stopped:
                    return None
                begins(cell)
                process = start(command_of(cell, device), self._threads)
                self._running.add(process)
            try:
                return outcome(process)
            finally:
                with self._lock:
                    self._running.discard(process)
        finally:
            self._free.put(device)

    def stop(self) -> None:
        """Let running cells save their state and end; a second Ctrl-C ends them at once."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGINT)
        try:
            for process in running:
                process.wait()
        except KeyboardInterrupt:
            for process in running:
                process.kill()
            raise

    def close(self) -> None:
        """Wait for the threads of the pool."""
        self._pool.shutdown(cancel_futures=True)


def start(command: Sequence[str], threads: int) -> subprocess.Popen[str]:
    """Start the worker's process, in a group of its own: Ctrl-C is for the one who started it to pass on."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [sys.executable, "-m", "fastmtl.experiments.worker", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=env,
        start_new_session=True,
    )


def outcome(process: subprocess.Popen[str]) -> str | None:
    """Wait for a worker's process; return why it failed, or None."""
    assert process.stderr is not None
    said = deque((line.strip() for line in process.stderr if line.strip()), maxlen=_LINES_KEPT)
    code = process.wait()
    assert process.stdin is not None
    process.stdin.close()
    process.stderr.close()
    return reason_of(code, list(said))


def reason_of(code: int, said: Sequence[str]) -> str | None:
    """Return why a process with this exit code failed, from what it said on stderr; None if it did not fail."""
    if code in (0, _INTERRUPTED):
        return None
    last = next((line.removeprefix("error: ") for line in reversed(said) if line.startswith("error: ")), "")
    if code == _USAGE:
        return _REFUSED + last
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", as the system does when memory is short" if -code == signal.SIGKILL else ""
        return f"The process was ended by {name}{memory}."
    return last.removesuffix(" (--traceback shows where)") or (said[-1] if said else f"It ended with exit code {code}.")


class Here:
    """Runs the cells in this process, one after the other, which is for debugging: an error of one is an error here."""

    def __init__(self, device: str = "") -> None:
        self._device = device

    def submit(self, cell: Cell, begins: Callable[[Cell], None]) -> Future[str | None]:
        """Run the cell now."""
        from fastmtl.experiments.worker import work

        done: Future[str | None] = Future()
        begins(cell)
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = work(command_of(cell, self._device))
        except FastmtlError as error:
            done.set_result(_REFUSED + str(error))
        else:
            if code == _INTERRUPTED:
                raise KeyboardInterrupt
            done.set_result(reason_of(code, said.getvalue().splitlines()))
        return done

    def stop(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing is held."""


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold an experiment's folder.

    Raises:
        UsageError: Another process works in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as cause:
        raise UsageError(f"The folder {folder} cannot be used: {cause.strerror}.") from cause
    with lock:
        try:
            import fcntl
        except ImportError:
            pass
        else:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"Another `fastmtl compare` is at work in {folder}: wait for it, or end it.") from None
        yield
