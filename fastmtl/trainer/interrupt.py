"""Ctrl-C that takes effect between two steps, so that no update is left half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["DeferredInterrupt"]


class DeferredInterrupt:
    """Within the ``with`` block the first SIGINT or SIGTERM is kept until :meth:`check`; a second one acts at once."""

    def __init__(self) -> None:
        self._caught = False
        self._before: dict[int, Any] = {}

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

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self._caught:
            raise KeyboardInterrupt
