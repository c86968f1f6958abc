"""The loss and the metric of a task, also in the form LibMTL's first versions had."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss
from fastmtl.metrics import AbsMetric

__all__ = ["TaskDict", "as_loss", "as_metric", "losses_of", "metrics_of"]

Part = TypeVar("Part")

# For each task ``metrics`` (names), ``metrics_fn``, ``loss_fn`` and ``weight``, as users give them.
TaskDict = Mapping[str, Mapping[str, Any]]


def losses_of(task_dict: TaskDict) -> dict[str, AbsLoss]:
    """Return the losses by task, each an object of its own, as it keeps the task's sums.

    Raises:
        UsageError: No loss, or one for several tasks that cannot be copied.
    """
    return _apart("loss_fn", {task: as_loss(task, about["loss_fn"]) for task, about in task_dict.items()})


def metrics_of(task_dict: TaskDict) -> dict[str, AbsMetric]:
    """Return the metrics by task, each an object of its own, as it keeps the task's sums.

    Raises:
        UsageError: No metric, or one for several tasks that cannot be copied.
    """
    return _apart("metrics_fn", {task: as_metric(task, about["metrics_fn"]) for task, about in task_dict.items()})


def _apart(key: str, parts: Mapping[str, Part]) -> dict[str, Part]:
    """Return the parts with a copy of one wherever an earlier task has it already."""
    owners: dict[int, str] = {}
    found: dict[str, Part] = {}
    for task, part in parts.items():
        owner = owners.setdefault(id(part), task)
        found[task] = part if owner == task else _copy(part, f"task_dict[{task!r}][{key!r}]", owner)
    return found


def _copy(part: Part, what: str, owner: str) -> Part:
    advice = f"{what} is the object of {owner!r} too: give each task one of its own, as it keeps the task's sums"
    # Two copies would be trained apart, if at all, where the user has one.
    if any(tensor.requires_grad for tensor in _tensors(part)):
        raise UsageError(f"{advice}; it holds parameters, so it is not copied.")
    try:
        return copy.deepcopy(part)
    except Exception as cause:
        raise UsageError(f"{advice}; it cannot be copied: {cause}.") from cause


def _tensors(part: object) -> Iterator[Tensor]:
    for value in (part, *getattr(part, "__dict__", {}).values()):
        if isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, Tensor):
            yield value


def as_loss(task: str, given: object) -> AbsLoss:
    """Return the loss of a task; a list of one, as LibMTL's first versions asked for, stands for the one.

    Raises:
        UsageError: No loss, or several.
    """
    if isinstance(given, list | tuple) and len(given) == 1:
        given = given[0]
    if not hasattr(given, "compute_loss") or isinstance(given, type):
        raise UsageError(
            f"task_dict[{task!r}]['loss_fn'] must be an object of a class derived from fastmtl.loss.AbsLoss, as "
            f"CELoss(), got {given!r}."
        )
    return cast(AbsLoss, given)


def as_metric(task: str, given: object) -> AbsMetric:
    """Return the metric of a task.

    Raises:
        UsageError: No metric; also for a list of two functions, which LibMTL's first versions asked for.
    """
    if isinstance(given, list | tuple):
        raise UsageError(
            f"task_dict[{task!r}]['metrics_fn'] is a list: its functions are now update_fun and score_fun of a class "
            f"derived from fastmtl.metrics.AbsMetric, as AccMetric()."
        )
    if not hasattr(given, "update_fun") or isinstance(given, type):
        raise UsageError(
            f"task_dict[{task!r}]['metrics_fn'] must be an object of a class derived from fastmtl.metrics.AbsMetric, "
            f"as AccMetric(), got {given!r}."
        )
    return cast(AbsMetric, given)
