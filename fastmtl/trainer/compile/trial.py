"""Several routes to the same gradients: all are tried in the first steps of training, which are good steps anyhow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from fastmtl.engine.methods.routes import Route

__all__ = ["Trial"]

# Steps of each route in a row, not timed and timed: in two rounds, as the machine may be slower for a while.
_ROUNDS = ((2, 5), (1, 5))
# Steps that may be left out for each one that counts.
_PATIENCE = 10


class Trial:
    """Hands out the routes in turn, times them, and settles on the fastest of those that turn out possible.

    Where too few steps say how long one takes, it settles on the first.

    Args:
        routes: By name.
        on_compile: Told of the decision.

    Attributes:
        chosen: The name of the fastest, None as long as it is not known.
    """

    def __init__(self, routes: Mapping[str, Route], on_compile: Callable[[str], None]) -> None:
        self.names = list(routes)
        self.routes = list(routes.values())
        self.on_compile = on_compile
        self.chosen: str | None = None
        self._seconds: list[list[float]] = [[] for _ in routes]
        # The routes of the steps to come, and whether they are timed; first the one under way.
        self._plan = [
            (index, timed)
            for warm_up, steps in _ROUNDS
            for index in range(len(routes))
            for timed in [False] * warm_up + [True] * steps
        ]
        self._started: float | None = None
        self._counts = True
        self._left_out, self._most_left_out = 0, _PATIENCE * len(self._plan)

    def leave_out(self) -> None:
        """Leave the step under way out: it is shorter than others, of some tasks or with weights known beforehand."""
        self._counts = False

    def next_route(self) -> Route:
        """Return the route of the next training step; the time since the last call is that of the last step."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if not self._counts:
            self._left_out += 1
        elif self._started is not None:
            index, timed = self._plan.pop(0)
            if timed:
                self._seconds[index].append(now - self._started)
            self._plan = [(index, timed) for index, timed in self._plan if self.routes[index].possible]
        self._started, self._counts = now, True
        if self._left_out > self._most_left_out:
            self.chosen = self.names[0]
            self.on_compile(f"too few steps are of all tasks to measure by: going on {self.chosen}")
            return self.routes[0]
        if self._plan:
            return self.routes[self._plan[0][0]]
        # What disturbs a full step makes it longer.
        times = {
            name: sorted(seconds)[len(seconds) // 4]
            for name, route, seconds in zip(self.names, self.routes, self._seconds, strict=True)
            if route.possible
        }
        self.chosen = min(times, key=times.__getitem__)
        measured = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items())
        self.on_compile(f"a step takes {measured}: going on {self.chosen}")
        return self.routes[self.names.index(self.chosen)]

    def settle(self, name: str) -> Route | None:
        """Return the route that an earlier part of the run has chosen, None if it is not among these."""
        if name not in self.names:
            return None
        self.chosen = name
        self.on_compile(f"going on {name}, as before")
        return self.routes[self.names.index(name)]
