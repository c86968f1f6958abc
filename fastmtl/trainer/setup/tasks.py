"""The loss and the metric of a task, also in the form LibMTL's first versions had."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss
from fastmtl.metrics import AbsMetric

__all__ = ["TaskDict", "losses_of", "metrics_of"]

# For each task ``metrics`` (names), ``metrics_fn``, ``loss_fn`` and ``weight``, as users give them.
TaskDict = Mapping[str, Mapping[str, Any]]


def losses_of(task_dict: TaskDict) -> dict[str, AbsLoss]:
    """Return the losses by task, each an object of its own, as it keeps the task's sums.

    Raises:
        UsageError: No loss, or one for several tasks that cannot be copied.
    """
    given = {task: about["loss_fn"] for task, about in task_dict.items()}
    # A list of one is what LibMTL's first versions asked for.
    given = {
        task: each[0] if isinstance(each, list | tuple) and len(each) == 1 else each for task, each in given.items()
    }
    return _apart("loss_fn", given, "compute_loss", "fastmtl.loss.AbsLoss, as CELoss()")


def metrics_of(task_dict: TaskDict) -> dict[str, AbsMetric]:
    """Return the metrics by task, each an object of its own, as it keeps the task's sums.

    Raises:
        UsageError: No metric, as LibMTL's first versions' list of two functions, or one for several tasks that cannot
            be copied.
    """
    given = {task: about["metrics_fn"] for task, about in task_dict.items()}
    for task, each in given.items():
        if isinstance(each, list | tuple):
            raise UsageError(
                f"task_dict[{task!r}]['metrics_fn'] is a list: its functions are now update_fun and score_fun of a "
                f"class derived from fastmtl.metrics.AbsMetric, as AccMetric()."
            )
    return _apart("metrics_fn", given, "update_fun", "fastmtl.metrics.AbsMetric, as AccMetric()")


def _apart(key: str, given: Mapping[str, Any], method: str, base: str) -> dict[str, Any]:
    """Return the parts, all of which must have the method, with a copy of one that an earlier task has already."""
    for task, part in given.items():
        if not hasattr(part, method) or isinstance(part, type):
            raise UsageError(
                f"task_dict[{task!r}][{key!r}] must be an object of a class derived from {base}, got {part!r}."
            )
    owners: dict[int, str] = {}
    found: dict[str, Any] = {}
    for task, part in given.items():
        owner = owners.setdefault(id(part), task)
        found[task] = part if owner == task else _copy(part, f"task_dict[{task!r}][{key!r}]", owner)
    return found


def _copy(part: object, what: str, owner: str) -> object:
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
