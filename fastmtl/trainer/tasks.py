"""Steps of some tasks: which ones are drawn, and a strategy that sees no others."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from fastmtl.engine.model import Tasks
from fastmtl.weighting import AbsWeighting

__all__ = ["SomeTasks", "StepTasks", "TaskSampler", "narrowed", "spread", "step_tasks", "write_back"]


class TaskSampler:
    """Deals out tasks like cards: all come up equally often, in an order that is new in every round.

    Args:
        count: Number of tasks T.
        per_step: Tasks of a step; all if None.
    """

    def __init__(self, count: int, per_step: int | None) -> None:
        self.count = count
        self.per_step = per_step
        self.left: list[int] = []

    def draw(self) -> list[int] | None:
        """Return the tasks of the next step in their own order, None for all."""
        if self.per_step is None:
            return None
        drawn: list[int] = []
        while len(drawn) < self.per_step:
            if not self.left:
                # What this step has had already comes last in the new round.
                self.left = random.sample(
                    [task for task in range(self.count) if task not in drawn], self.count - len(drawn)
                )
                self.left += drawn
            drawn.append(self.left.pop(0))
        return sorted(drawn)


class StepTasks:
    """The tasks of a step that has all of them.

    Args:
        places: Their places in ``task_name``.
        names: Their names.

    Attributes:
        are_all: Whether the step has all tasks.
    """

    are_all = True

    def __init__(self, places: list[int], names: Tasks) -> None:
        self.places = places
        self.names = names

    def spread(self, values: Tensor | None, fill: float) -> Tensor | None:
        """Return values of the tasks of the step, (k,) or (k, k), as (T,) or (T, T), ``fill`` elsewhere."""
        return values

    def spread_groups(self, values: Tensor | None, fill: float) -> Tensor | None:
        """Return values of L groups of parameters likewise, (L, k) or (L, k, k) as (L, T) or (L, T, T)."""
        return values

    def alone(self, strategy: AbsWeighting) -> AbstractContextManager[None]:
        """Let a strategy see these tasks alone; what it remembers of the others stays as it is."""
        return nullcontext()

    def keeping(self, optimizer: torch.optim.Optimizer, strategy: AbsWeighting) -> AbstractContextManager[None]:
        """Leave a strategy's own parameters of other tasks, and what an optimizer remembers of them, as they are."""
        return nullcontext()


class SomeTasks(StepTasks):
    """The tasks of a step that lacks some of ``count`` tasks."""

    are_all = False

    def __init__(self, places: list[int], names: Tasks, count: int) -> None:
        super().__init__(places, names)
        self.count = count

    def spread(self, values: Tensor | None, fill: float) -> Tensor | None:
        """Return the values of all tasks."""
        return None if values is None else spread(values, self.places, self.count, fill)

    def spread_groups(self, values: Tensor | None, fill: float) -> Tensor | None:
        """Return the values of all tasks."""
        return (
            None
            if values is None
            else torch.stack([spread(of_one, self.places, self.count, fill) for of_one in values])
        )

    @contextmanager
    def alone(self, strategy: AbsWeighting) -> Iterator[None]:
        """Narrow ``task_num``, what the strategy remembers, and its own parameter ``loss_scale``."""
        index = _index(self.places, strategy.device)
        whole: dict[str, Tensor] = {name: getattr(strategy, name) for name in strategy.remembered()}
        dims = strategy.task_dims
        parts = {name: _narrow(value, dims[name], index) for name, value in whole.items() if dims[name]}
        strategy.task_num, strategy.active = len(self.places), list(self.places)
        for name, value in parts.items():
            setattr(strategy, name, value)
        scale = _own_parameter(strategy)
        if scale is not None:
            strategy.loss_scale = nn.Parameter(scale.detach().index_select(0, index))
        try:
            yield
        finally:
            strategy.task_num, strategy.active = self.count, None
            for name, value in whole.items():
                part = getattr(strategy, name)
                if part is not value:
                    setattr(strategy, name, value)
                    _write_back(value, part, dims[name], index)
            if scale is not None:
                grad = strategy.loss_scale.grad
                strategy.loss_scale = scale
                if grad is not None:
                    scale.grad = spread(grad, self.places, len(scale), 0.0)

    @contextmanager
    def keeping(self, optimizer: torch.optim.Optimizer, strategy: AbsWeighting) -> Iterator[None]:
        """Put back the other tasks' entries of ``loss_scale`` and of its moments."""
        param = _own_parameter(strategy)
        if param is None:
            yield
            return
        before = param.detach().clone()
        known = {key: value.clone() for key, value in optimizer.state.get(param, {}).items() if _is_like(value, param)}
        yield
        ones = torch.ones_like(before).index_select(0, _index(self.places, before.device))
        chosen = spread(ones, self.places, len(before), 0.0) != 0
        with torch.no_grad():
            param.copy_(torch.where(chosen, param, before))
            for key, value in optimizer.state.get(param, {}).items():
                if _is_like(value, param):
                    value.copy_(torch.where(chosen, value, known.get(key, torch.zeros_like(value))))


def step_tasks(places: list[int], names: Sequence[str]) -> StepTasks:
    """Return the tasks of a step from their places among the names of all."""
    if len(places) == len(names):
        return StepTasks(places, tuple(names))
    return SomeTasks(places, tuple(names[place] for place in places), len(names))


def _own_parameter(strategy: AbsWeighting) -> nn.Parameter | None:
    return getattr(strategy, "loss_scale", None)


def _is_like(value: object, param: Tensor) -> TypeIs[Tensor]:
    return isinstance(value, Tensor) and value.shape == param.shape


def narrowed(values: Tensor | None, tasks: Sequence[int]) -> Tensor | None:
    """Return the entries (..., k) of some tasks of (..., T) values."""
    return None if values is None else values.index_select(-1, _index(tasks, values.device))


def write_back(whole: Tensor, part: Tensor, tasks: Sequence[int]) -> None:
    """Write the entries (..., k) of some tasks into (..., T) values."""
    _write_back(whole, part, [whole.dim() - 1], _index(tasks, whole.device))


def spread(values: Tensor, tasks: Sequence[int], count: int, fill: float) -> Tensor:
    """Return (k,) or (k, k) values of some tasks as (T,) or (T, T), ``fill`` elsewhere."""
    index = _index(tasks, values.device)
    whole = values.new_full((count,) * values.dim(), fill)
    _write_back(whole, values, list(range(values.dim())), index)
    return whole


def _index(tasks: Sequence[int], device: torch.device) -> Tensor:
    # Numbers from the host would be a copy that waits; these are filled in on the device.
    return torch.stack([torch.full((), task, dtype=torch.int64, device=device) for task in tasks])


def _narrow(value: Tensor, dims: Sequence[int], index: Tensor) -> Tensor:
    for dim in dims:
        value = value.index_select(dim, index)
    return value.clone()


def _write_back(whole: Tensor, part: Tensor, dims: Sequence[int], index: Tensor) -> None:
    if not dims:
        whole.copy_(part)
        return
    at: list[slice | Tensor] = [slice(None)] * whole.dim()
    for place, dim in enumerate(dims):
        shape = [1] * len(dims)
        shape[place] = -1
        at[dim] = index.view(shape)
    whole[tuple(at)] = part
