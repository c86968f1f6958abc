"""A training step in a process of its own, where nothing is set up for it that its users do not have."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from fastmtl.benchmarks.contender import Contender
from torch import Tensor

from fastmtl.errors import FastmtlError

__all__ = ["Apart"]

# Threads of the process that ran last still look for work a few milliseconds, on the processors of the next one.
_PAUSE = 0.02


class Apart:
    """A :class:`Contender` whose step runs in another process, alone while it runs.

    Args:
        name: What errors call it.
        build: Makes the contender there; picklable. What it raises of ours is raised here.

    Raises:
        FastmtlError: It fails, or its process ends.
    """

    def __init__(self, name: str, build: Callable[[], Contender]) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, build, torch.get_num_threads()), daemon=True)
        process.start()
        theirs.close()
        weakref.finalize(self, _end, self._pipe, process)
        self._answer()

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, repeats: int) -> float:
        """Return the seconds a step takes, by the clock of its process."""
        found = float(self._ask("seconds", repeats))
        _stay_awake(_PAUSE)
        return found

    def update(self) -> Tensor:
        return torch.from_numpy(self._ask("update"))

    def peak_bytes(self) -> int:
        return int(self._ask("peak_bytes"))

    def _ask(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
        except OSError:
            raise self._gone() from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            found = self._pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(found, FastmtlError):
            raise found
        if isinstance(found, Exception):
            first = next(iter(str(found).strip().splitlines()), "")
            raise FastmtlError(f"{self._name} failed: {type(found).__name__}: {first}")
        return found

    def _gone(self) -> FastmtlError:
        return FastmtlError(f"The process of {self._name} ended before its step did, for want of memory perhaps.")


def _end(pipe: Connection, process: BaseProcess) -> None:
    pipe.close()
    process.join(5)
    process.kill()


def _serve(pipe: Connection, build: Callable[[], Contender], threads: int) -> None:
    """Answer requests until the other end is closed."""
    # Ctrl-C is the other process's, which then closes its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        contender = build()
        pipe.send(None)
        while True:
            try:
                name, *args = pipe.recv()
            except EOFError:
                return
            pipe.send(_REQUESTS[name](contender, *args))
    except Exception as error:
        if not isinstance(error, FastmtlError):
            traceback.print_exc()
        pipe.send(error)


def _stay_awake(seconds: float) -> None:
    """Wait; a processor that sleeps instead is slow at first."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _seconds(contender: Contender, repeats: int) -> float:
    _stay_awake(_PAUSE)
    start = time.perf_counter()
    for _ in range(repeats):
        contender()
    return (time.perf_counter() - start) / repeats


_REQUESTS: dict[str, Callable[..., Any]] = {
    "seconds": _seconds,
    "update": lambda contender: contender.update().numpy(),
    "peak_bytes": lambda contender: contender.peak_bytes(),
}
