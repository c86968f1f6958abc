"""Ctrl-C that takes effect between two steps, so that no update is left half done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

__all__ = ["DeferredInterrupt"]


class DeferredInterrupt:
    """Within the ``with`` block the first SIGINT or SIGTERM is kept until :meth:`check`; a second one acts at once.

    ``tells`` says on stderr that the first one has been noticed, as a step that compiles or an evaluation may be long.
    """

    def __init__(self, tells: bool = True) -> None:
        self._tells = tells
        self._caught = False
        self._before: dict[int, signal.Handlers | int | Callable[[int, FrameType | None], object] | None] = {}

    def __enter__(self) -> DeferredInterrupt:
        # Signal handlers can only be set in the main thread; elsewhere an interrupt is not ours to handle.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._caught:
            raise KeyboardInterrupt
        self._caught = True
        if self._tells:
            # The signal may come in the middle of a print, so the stream and its buffer are left alone.
            with contextlib.suppress(OSError):
                os.write(2, b"\ninterrupted: saving after this step or evaluation; once more to stop at once\n")

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self._caught:
            raise KeyboardInterrupt
