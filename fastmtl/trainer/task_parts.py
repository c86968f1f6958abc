"""The loss and the metric of a task, also in the form LibMTL's first versions had."""

from __future__ import annotations

from typing import Any

from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss
from fastmtl.metrics import AbsMetric

__all__ = ["as_loss", "as_metric"]


def as_loss(task: str, given: Any) -> AbsLoss:
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
    return given


def as_metric(task: str, given: Any) -> AbsMetric:
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
    return given
