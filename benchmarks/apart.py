"""A training step in a separate process, set up only as its users have it."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
        build: Makes the contender there; picklable.

    Raises:
        FastmtlError: What ``build`` raises of ours.
        RuntimeError: Anything else is raised there, or the process ends.
    """

    def __init__(self, name: str, build: Callable[[], Contender]) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, build, torch.get_num_threads()), daemon=True)
        with _without_interrupts():
            process.start()
        theirs.close()
        weakref.finalize(self, _end, self._pipe, process)
        self._answer()

    def __call__(self) -> None:
        self._ask("seconds", 1)

    def seconds(self, repeats: int) -> float:
        seconds = float(self._ask("seconds", repeats))
        _stay_awake(_PAUSE)
        return seconds

    def update(self) -> Tensor:
        return torch.from_numpy(self._ask("update"))

    def peak_bytes(self) -> int:
        return int(self._ask("peak_bytes"))

    def launches(self) -> int:
        return int(self._ask("launches"))

    def _ask(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
        except OSError:
            raise self._gone() from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(answer, FastmtlError):
            raise answer
        if isinstance(answer, _Failure):
            error = RuntimeError(f"{self._name} failed: {answer.message}")
            error.add_note(answer.trace)
            raise error
        return answer

    def _gone(self) -> RuntimeError:
        return RuntimeError(f"the process of {self._name} ended before its step did, for want of memory perhaps")


@dataclass(frozen=True, slots=True)
class _Failure:
    """An exception in words: its class need not be known in both processes."""

    message: str
    trace: str


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hide Ctrl-C from a process that is started; whoever starts it ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(pipe: Connection, process: BaseProcess) -> None:
    pipe.close()
    process.kill()
    process.join()


def _stay_awake(seconds: float) -> None:
    """Wait; a processor that sleeps instead is slow at first."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _serve(pipe: Connection, build: Callable[[], Contender], threads: int) -> None:
    """Answer requests until something fails or the process is ended."""
    torch.set_num_threads(threads)
    answer: Any
    try:
        contender = build()
        pipe.send(None)
        while True:
            request, *args = pipe.recv()
            answer = _REQUESTS[request](contender, *args)
            pipe.send(answer)
    except FastmtlError as error:
        answer = error
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        answer = _Failure(f"{type(error).__name__}: {first}", traceback.format_exc())
    pipe.send(answer)


def _seconds(contender: Contender, repeats: int) -> float:
    _stay_awake(_PAUSE)
    return contender.seconds(repeats)


_REQUESTS: dict[str, Callable[..., Any]] = {
    "seconds": _seconds,
    "update": lambda contender: contender.update().numpy(),
    "peak_bytes": lambda contender: contender.peak_bytes(),
    "launches": lambda contender: contender.launches(),
}
