"""Several routes to the same gradients: all are tried in the first steps of training, which are good steps anyhow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from fastmtl.trainer.routes import Route

__all__ = ["Trial"]

_WARM_UP, _TIMED = 2, 5


class Trial:
    """Hands out the routes in turn, times them, and settles on the fastest.

    Args:
        routes: By name.
        on_compile: Told of the decision.
    """

    def __init__(self, routes: Mapping[str, Route], on_compile: Callable[[str], None]) -> None:
        self.names = list(routes)
        self.routes = list(routes.values())
        self.on_compile = on_compile
        self.decided = False
        self._seconds: list[list[float]] = [[] for _ in routes]
        self._at = 0
        self._started: float | None = None

    def next_route(self) -> Route:
        """Return the route of the next training step; the time since the last call is that of the last step."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._started is not None:
            self._seconds[self._at].append(now - self._started)
            if len(self._seconds[self._at]) == _WARM_UP + _TIMED:
                self._at += 1
        self._started = now
        if self._at < len(self.routes):
            return self.routes[self._at]
        self.decided = True
        times = [sorted(seconds[_WARM_UP:])[_TIMED // 2] for seconds in self._seconds]
        best = min(range(len(times)), key=times.__getitem__)
        measured = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in zip(self.names, times, strict=True))
        self.on_compile(f"a step takes {measured}: going on {self.names[best]}")
        return self.routes[best]
