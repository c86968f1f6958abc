"""What holds of the weights from step to step: weights that are held, moving averages, what the strategy remembers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmtl.engine.comm import Comm
from fastmtl.engine.scaling import LossScale
from fastmtl.engine.weights import Weights
from fastmtl.support.kinds import Settings, State
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.trainer.tasks import StepTasks, narrowed, write_back
from fastmtl.weighting import AbsWeighting

__all__ = ["WeightState"]

# Of the weights of the shared parameters and of the heads.
Average = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class Learned:
    """What a step may change: weights held, averages, and what the strategy remembers, by name."""

    held: Weights | None
    average: Average | None
    remembered: Mapping[str, Tensor]


class WeightState:
    """Keeps what holds from step to step.

    Args:
        strategy: Network and strategy.
        hyper: Hyper-parameters of the strategy.
        options: Checked options.
        comm: The other processes.

    Attributes:
        kept: The weights of the last solve, where they hold for several steps.
        average: The moving averages of the weights.
    """

    def __init__(self, strategy: AbsWeighting, hyper: Settings, options: StepOptions, comm: Comm) -> None:
        self.strategy = strategy
        self.hyper = hyper
        self.every = 1 if strategy.needs_of_step() == "backward" else options.update_weights_every
        self.momentum = options.weight_momentum
        self.comm = comm
        self.kept: Weights | None = None
        self.average: Average | None = None
        self._since_solved = 0
        # Weights of steps of some tasks, as long as no step of all tasks has been.
        self._partial: tuple[list[int], Weights, int] | None = None

    def held(self) -> Weights | None:
        """Return the weights that hold for this step without a solve, None if it is time for one."""
        if self.kept is None or self._since_solved >= self.every:
            return None
        self._since_solved += 1
        return replace(self.kept, groups=self.strategy.groups(**self.hyper))

    def accept(self, weights: Weights, scaling: LossScale) -> Weights:
        """Return the weights of a solve as all processes have them, averaged if they are to be; hold them.

        The gradients of the strategy's own parameters are written.
        """
        if weights.reps is None:
            self.comm.broadcast([weights.shared, weights.heads])
        if self.momentum and weights.reports:
            self._smooth(weights)
        for param, grad in weights.own_grads.items():
            self.strategy.get_parameter(param).grad = scaling.up(grad)
        if self.every > 1:
            self.kept, self._since_solved = self._completed(replace(weights, gram=None, grams=None)), 1
        return weights

    def _completed(self, weights: Weights) -> Weights:
        """Return weights to hold: those of tasks that take no part in this step may do so in the next."""
        if weights.known is None:
            return weights
        shared, heads, logged = (
            _unless(~weights.known, getattr(weights, name), getattr(self.kept, name, None), 1.0)
            for name in ("shared", "heads", "logged")
        )
        assert shared is not None
        return replace(weights, shared=shared, heads=heads, logged=logged)

    def _smooth(self, weights: Weights) -> None:
        """Put moving averages in the place of the weights."""
        if self.average is None:
            unknown = torch.full_like(weights.shared, torch.nan)
            self.average = unknown, None if weights.heads is None else torch.full_like(weights.heads, torch.nan)
        shared, heads = self.average
        weights.shared, shared = self._follow(weights.shared, shared, weights.known)
        if weights.heads is not None and heads is not None:
            weights.heads, heads = self._follow(weights.heads, heads, weights.known)
        weights.logged = None
        self.average = shared, heads

    def _follow(self, new: Tensor, average: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weights of this step, and the new average."""
        # There is none before the first step, nor after one that was taken back.
        moved = torch.lerp(new, torch.where(average.isnan(), new, average), self.momentum)
        if known is None:
            return moved, moved
        return torch.where(known, moved, new), torch.where(known, moved, average)

    def learned(self) -> Learned:
        """Return what `take_back` goes back to."""
        remembered = {name: getattr(self.strategy, name).clone() for name in self.strategy.remembered()}
        return Learned(self.kept, self.average, remembered)

    def take_back(self, before: Learned, bad: Tensor) -> None:
        """Forget what a step has decided, and the strategy learned, since ``before`` if the scalar ``bad`` is true."""
        for name, old in before.remembered.items():
            setattr(self.strategy, name, torch.where(bad, old, getattr(self.strategy, name)))
        if self.average is not None and self.average is not before.average:
            olds = (None, None) if before.average is None else before.average
            shared, heads = (_unless(bad, new, old, torch.nan) for new, old in zip(self.average, olds, strict=True))
            assert shared is not None
            self.average = shared, heads
        if self.kept is not None and self.kept is not before.held:
            # Without a decision all tasks count alike until the next.
            shared, heads, logged = (
                _unless(bad, getattr(self.kept, name), getattr(before.held, name, None), 1.0)
                for name in ("shared", "heads", "logged")
            )
            assert shared is not None
            self.kept = replace(self.kept, shared=shared, heads=heads, logged=logged)

    def restricted(self, tasks: StepTasks) -> AbstractContextManager[WeightState]:
        """Let the strategy, and what is held between steps, be of the tasks of a step."""
        return nullcontext(self) if tasks.are_all else self._restricted(tasks)

    @contextmanager
    def _restricted(self, tasks: StepTasks) -> Iterator[WeightState]:
        with tasks.alone(self.strategy), self._narrowed(tasks.places):
            yield self

    @contextmanager
    def _narrowed(self, tasks: list[int]) -> Iterator[None]:
        """Let what is held between steps be of some tasks.

        A solve of those alone is not held for steps of all; where no such step has been, it is for steps of the same
        tasks.
        """
        held, average, since = self.kept, self.average, self._since_solved
        if held is not None:
            shared, heads = (self._by_sample(part, tasks) for part in (held.shared, held.heads))
            assert shared is not None
            self.kept = replace(held, shared=shared, heads=heads, logged=narrowed(held.logged, tasks))
        elif self._partial is not None and self._partial[0] == tasks:
            _, self.kept, self._since_solved = self._partial
        if average is not None:
            shared, heads = (narrowed(part, tasks) for part in average)
            assert shared is not None
            self.average = shared, heads
        solves = held is None or since >= self.every
        try:
            yield
        finally:
            solved, some, self.kept, self.average = self.kept, self.average, held, average
            if held is None and solved is not None:
                self._partial = list(tasks), solved, self._since_solved
            if solves:
                self._since_solved = since
            if some is not None:
                self.average = self._widened(average, some, tasks)

    def _widened(self, average: Average | None, some: Average, tasks: list[int]) -> Average:
        """Return averages of all tasks, with new ones of some; what is not known yet is NaN, until it is."""
        wholes = (None, None) if average is None else average
        shared, heads = (self._written(whole, part, tasks) for whole, part in zip(wholes, some, strict=True))
        assert shared is not None
        return shared, heads

    def _written(self, whole: Tensor | None, some: Tensor | None, tasks: list[int]) -> Tensor | None:
        """Return weights with other ones of some tasks; the old ones may not be logged yet."""
        if some is None:
            return whole
        if whole is None:
            whole = some.new_full((*some.shape[:-1], len(self.strategy.task_name)), torch.nan)
        whole = whole.clone()
        write_back(whole, some, tasks)
        return whole

    def _by_sample(self, weights: Tensor | None, tasks: list[int]) -> Tensor | None:
        """Return the entries of some tasks, sample by sample."""
        if weights is None:
            return None
        narrow = narrowed(weights.unflatten(-1, (self.strategy.samples, -1)), tasks)
        assert narrow is not None
        return narrow.flatten(-2)

    def state_dict(self) -> State:
        """Return what a resumed run needs of the weights held between two solves."""
        kept = None if self.kept is None else _stored(self.kept)
        partial = None if self._partial is None else (self._partial[0], _stored(self._partial[1]), self._partial[2])
        return {"since_solved": self._since_solved, "held": kept, "average": self.average, "partial": partial}

    def load_state_dict(self, state: Settings) -> None:
        """Go on where `state_dict` was taken."""
        self._since_solved = state["since_solved"]
        self.kept = None if state["held"] is None else Weights(**state["held"])
        self.average = state["average"]
        partial = state.get("partial")
        self._partial = None if partial is None else (partial[0], Weights(**partial[1]), partial[2])


def _stored(weights: Weights) -> dict[str, Tensor | float | None]:
    return {name: getattr(weights, name) for name in ("shared", "heads", "logged", "max_norm")}


def _unless(bad: Tensor, new: Tensor | None, old: Tensor | None, start: float) -> Tensor | None:
    """Return ``old`` where ``bad``, ``start`` if there is none, else ``new``."""
    return None if new is None else torch.where(bad, start if old is None else old.to(new), new)
