"""Several engines for the same gradients: all are tried in the first steps of training, which are good steps anyhow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import torch

__all__ = ["Trial"]

# Steps of each engine in a row, not timed and timed: in two rounds, as the machine may be slower for a while.
_ROUNDS = ((2, 5), (1, 5))
# Steps that may be left out for each one that counts.
_PATIENCE = 10


class _Tried(Protocol):
    @property
    def possible(self) -> bool:
        """Return False once it is known to do the same as a simpler one."""


E = TypeVar("E", bound=_Tried)


class Trial(Generic[E]):
    """Hands out the engines in turn, times them, and settles on the fastest of those that turn out possible.

    Where too few steps say how long one takes, it settles on the first. A single one is settled from the beginning.

    Args:
        engines: By name.
        tell: Told of the decision.

    Attributes:
        engine: The engine of the step under way.
        chosen: The name of the fastest, None as long as it is not known, or if there is no choice.
        seconds: What a step takes with each engine, once it is measured.
        settled: Whether the engine stays.
        warmth: Steps run with this engine so far, of those after a decision.
    """

    def __init__(self, engines: Mapping[str, E], tell: Callable[[str], None]) -> None:
        self.names = list(engines)
        self.engines = list(engines.values())
        self.tell = tell
        self.engine = self.engines[0]
        self.chosen: str | None = None
        self.seconds: dict[str, float] = {}
        self.settled = len(engines) == 1
        self.warmth = 0
        self._samples: list[list[float]] = [[] for _ in engines]
        # The engines of the steps to come, and whether they are timed; first the one under way.
        self._plan = [
            (index, timed)
            for warm_up, steps in _ROUNDS
            for index in range(len(engines))
            for timed in [False] * warm_up + [True] * steps
        ]
        self._started: float | None = None
        self._counts = True
        self._left_out, self._most_left_out = 0, _PATIENCE * len(self._plan)

    def leave_out(self) -> None:
        """Leave the step under way out: it is shorter than others, of some tasks or with weights known beforehand."""
        self._counts = False

    def next_engine(self) -> E:
        """Return the engine of the next training step; the time since the last call is that of the last step."""
        if not self.settled:
            self.warmth = 0
            self.engine = self._next()
        self.warmth += 1
        return self.engine

    def _next(self) -> E:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if not self._counts:
            self._left_out += 1
        elif self._started is not None:
            index, timed = self._plan.pop(0)
            if timed:
                self._samples[index].append(now - self._started)
            self._plan = [(index, timed) for index, timed in self._plan if self.engines[index].possible]
        self._started, self._counts = now, True
        if self._left_out > self._most_left_out:
            self.tell(f"too few steps are whole ones to measure by: going on {self.names[0]}")
            return self._choose(self.names[0])
        if self._plan:
            return self.engines[self._plan[0][0]]
        # What disturbs a full step makes it longer.
        self.seconds = {
            name: sorted(samples)[len(samples) // 4]
            for name, engine, samples in zip(self.names, self.engines, self._samples, strict=True)
            if engine.possible
        }
        chosen = min(self.seconds, key=self.seconds.__getitem__)
        measured = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in self.seconds.items())
        self.tell(f"a step takes {measured}: going on {chosen}")
        return self._choose(chosen)

    def settle(self, name: str | None) -> None:
        """Go on with the engine that an earlier part of the run has chosen, if it is among these."""
        if name in self.names and not self.settled:
            self.tell(f"going on {name}, as before")
            self.engine = self._choose(name)

    def _choose(self, name: str) -> E:
        self.chosen, self.settled = name, True
        return self.engines[self.names.index(name)]
