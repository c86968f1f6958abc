"""Steps of some tasks: which ones are drawn, and a strategy that sees no others."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.engine.losses import Problem

__all__ = ["OWN", "TaskSampler", "keeping", "narrowed", "only", "spread", "write_back"]

OWN = "loss_scale"


class TaskSampler:
    """Deals out tasks like cards: all come up equally often, in an order that is new in every round.

    Args:
        count: Number of tasks T.
        per_step: Tasks of a step.
    """

    def __init__(self, count: int, per_step: int) -> None:
        self.count = count
        self.per_step = per_step
        self.left: list[int] = []

    def draw(self) -> list[int]:
        """Return the tasks of the next step in their own order."""
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


@contextmanager
def only(problem: Problem, tasks: Sequence[int]) -> Iterator[None]:
    """Let a problem and its strategy see some of the tasks; what is remembered of the others stays as it is.

    The strategy's own parameter ``loss_scale`` has entries of these tasks alone too, and its gradient is 0 for the
    others.
    """
    model: Any = problem.model
    index = _index(tasks, model.device)
    names, count = problem.tasks, model.task_num
    whole: dict[str, Tensor] = {name: getattr(model, name) for name in model.remembered()}
    dims = model.task_dims
    problem.tasks, model.task_num, model.active = [names[t] for t in tasks], len(tasks), list(tasks)
    for name, value in whole.items():
        setattr(model, name, _narrow(value, dims[name], index))
    scale: nn.Parameter | None = getattr(model, OWN, None)
    if scale is not None:
        model.loss_scale = nn.Parameter(scale.detach().index_select(0, index))
    try:
        yield
    finally:
        problem.tasks, model.task_num, model.active = names, count, None
        for name, value in whole.items():
            part = getattr(model, name)
            setattr(model, name, value)
            _write_back(value, part, dims[name], index)
        if scale is not None:
            grad = model.loss_scale.grad
            model.loss_scale = scale
            if grad is not None:
                scale.grad = spread(grad, tasks, len(scale), 0.0)


@contextmanager
def keeping(optimizer: torch.optim.Optimizer, param: Tensor, tasks: Sequence[int]) -> Iterator[None]:
    """Leave a (T,) parameter, and what an optimizer remembers of it, as they are but for some tasks."""
    before = param.detach().clone()
    known = {key: value.clone() for key, value in optimizer.state.get(param, {}).items() if _is_like(value, param)}
    yield
    chosen = spread(torch.ones_like(before).index_select(0, _index(tasks, before.device)), tasks, len(before), 0.0) != 0
    with torch.no_grad():
        param.copy_(torch.where(chosen, param, before))
        for key, value in optimizer.state.get(param, {}).items():
            if _is_like(value, param):
                value.copy_(torch.where(chosen, value, known.get(key, torch.zeros_like(value))))


def _is_like(value: Any, param: Tensor) -> bool:
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
    at: list[Any] = [slice(None)] * whole.dim()
    for place, dim in enumerate(dims):
        shape = [1] * len(dims)
        shape[place] = -1
        at[dim] = index.view(shape)
    whole[tuple(at)] = part
