"""Tasks of the usual kinds, and losses and metrics by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

from torch import nn

from fastmtl import loss as losses
from fastmtl import metrics
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss, BCELoss, CELoss, DepthLoss, FocalLoss, MSELoss, NormalLoss, SegLoss
from fastmtl.metrics import AbsMetric, AccMetric, DepthMetric, L1Metric, NormalMetric, SegMetric, TorchMetric
from fastmtl.model.heads import DenseHead, PooledHead
from fastmtl.support.named import Kind, place_of, short_name
from fastmtl.support.names import known_name

__all__ = [
    "KINDS",
    "Task",
    "TaskInfo",
    "binary",
    "classes",
    "depth",
    "kind_of",
    "normals",
    "regression",
    "segmentation",
    "with_named",
]


class Task(TypedDict):
    """The entry of a task in LibMTL's ``task_dict``."""

    metrics: list[str]
    metrics_fn: AbsMetric
    loss_fn: AbsLoss
    weight: list[int]


@dataclass(kw_only=True, slots=True, frozen=True)
class TaskInfo:
    """A task before it is made.

    Attributes:
        outputs: Number of outputs of its decoder.
        make_loss, make_metric: Create its loss and its metric.
        metrics: Names of the metric's scores.
        weight: For each of them 1 if higher is better, else 0.
        make_head: Creates its decoder from the encoder's channels and ``outputs``, and from ``size``, (height, width)
            of the image, for ``maps``.
        labels: Names of the classes, where they have any.
        maps: Whether predictions are maps of the image's size.
    """

    outputs: int
    make_loss: Callable[[], Any]
    make_metric: Callable[[], AbsMetric]
    metrics: tuple[str, ...]
    weight: tuple[int, ...]
    make_head: Callable[..., nn.Module] = PooledHead
    labels: tuple[str, ...] = ()
    maps: bool = False

    def task(self) -> Task:
        """Return a new entry of ``task_dict``."""
        return Task(
            metrics=list(self.metrics),
            metrics_fn=self.make_metric(),
            loss_fn=self.make_loss(),
            weight=list(self.weight),
        )


def classes(of: int | Sequence[str]) -> TaskInfo:
    """Return the task of naming one of several classes, given as their number or names: labels (batch,) of integers."""
    labels = () if isinstance(of, int) else tuple(map(str, of))
    return TaskInfo(
        outputs=of if isinstance(of, int) else len(of),
        make_loss=CELoss,
        make_metric=AccMetric,
        metrics=("Acc",),
        weight=(1,),
        labels=labels,
    )


def binary() -> TaskInfo:
    """Return the task of saying yes or no: labels (batch, 1) of 0 and 1."""
    return TaskInfo(outputs=1, make_loss=BCELoss, make_metric=_auroc, metrics=("AUC",), weight=(1,))


def regression(outputs: int = 1) -> TaskInfo:
    """Return the task of predicting numbers: labels (batch, outputs)."""
    return TaskInfo(outputs=outputs, make_loss=MSELoss, make_metric=L1Metric, metrics=("L1",), weight=(0,))


def segmentation(of: int | Sequence[str]) -> TaskInfo:
    """Return the task of naming the class of each pixel: labels (batch, h, w), -1 for none."""
    count = of if isinstance(of, int) else len(of)
    return TaskInfo(
        outputs=count,
        make_loss=SegLoss,
        make_metric=partial(SegMetric, count),
        metrics=("mIoU", "pixAcc"),
        weight=(1, 1),
        make_head=DenseHead,
        labels=() if isinstance(of, int) else tuple(map(str, of)),
        maps=True,
    )


def depth() -> TaskInfo:
    """Return the task of predicting each pixel's depth: labels (batch, 1, h, w), 0 for unknown."""
    names = ("abs_err", "rel_err")
    return TaskInfo(
        outputs=1,
        make_loss=DepthLoss,
        make_metric=DepthMetric,
        metrics=names,
        weight=(0, 0),
        make_head=DenseHead,
        maps=True,
    )


def normals() -> TaskInfo:
    """Return the task of predicting surface normals: labels (batch, 3, h, w), zeros for unknown."""
    return TaskInfo(
        outputs=3,
        make_loss=NormalLoss,
        make_metric=NormalMetric,
        metrics=("mean", "median", "<11.25", "<22.5", "<30"),
        weight=(0, 0, 1, 1, 1),
        make_head=DenseHead,
        maps=True,
    )


def _auroc() -> AbsMetric:
    from torchmetrics.classification import BinaryAUROC

    return TorchMetric(BinaryAUROC())


# Those whose number of outputs is given or found in the data take it.
KINDS: dict[str, Callable[..., TaskInfo]] = {
    "classes": classes,
    "binary": binary,
    "regression": regression,
    "segmentation": segmentation,
    "depth": depth,
    "normals": normals,
}

_LOSSES: dict[str, Any] = {name: getattr(losses, name) for name in losses.__all__ if name != "AbsLoss"}
_METRICS: dict[str, Any] = {name: getattr(metrics, name) for name in metrics.__all__ if name != "AbsMetric"}
_SCORES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "AccMetric": (("Acc",), (1,)),
    "F1Metric": (("F1",), (1,)),
    "L1Metric": (("L1",), (0,)),
    "SegMetric": (("mIoU", "pixAcc"), (1, 1)),
    "DepthMetric": (("abs_err", "rel_err"), (0, 0)),
    "NormalMetric": (("mean", "median", "<11.25", "<22.5", "<30"), (0, 0, 1, 1, 1)),
}


def kind_of(task: Mapping[str, Any]) -> str:
    """Return which of ``KINDS`` an entry of ``task_dict`` is by its loss; ``"other"`` for none of them."""
    loss = task["loss_fn"]
    by_loss: dict[str, Any] = {
        "classes": (CELoss, FocalLoss, nn.CrossEntropyLoss),
        "binary": (BCELoss, nn.BCEWithLogitsLoss),
        "segmentation": SegLoss,
        "depth": DepthLoss,
        "normals": NormalLoss,
        "regression": (losses.MSELoss, losses.L1Loss, losses.HuberLoss, nn.MSELoss, nn.L1Loss, nn.HuberLoss),
    }
    return next((kind for kind, kinds in by_loss.items() if isinstance(loss, kinds)), "other")


def with_named(
    task_dict: Mapping[str, Mapping[str, Any]], loss: Mapping[str, Any], metric: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return a ``task_dict`` with losses and metrics by name in place of some of its own.

    Args:
        task_dict: The tasks.
        loss: Task to the name of a loss of ``fastmtl.loss``, ``module:name`` or ``file.py:name``, or to a mapping with
            the ``name`` and arguments. It may be a class or function that makes a loss, or a function that is one.
        metric: The same of metrics, those of torchmetrics too. ``metrics`` and ``weight`` name its scores and say for
            each whether higher is better (1) or not (0), where the metric itself does not.

    Raises:
        UsageError: There is no such task, loss or metric, or it cannot be made as given.
    """
    whole = {task: dict(about) for task, about in task_dict.items()}
    for what, named in (("loss", loss), ("metric", metric)):
        for task, given in named.items():
            if task not in whole:
                raise UsageError(f"{what} names a task {task!r}, but the tasks are {', '.join(whole)}.")
            whole[task] |= _loss(task, given) if what == "loss" else _metric(task, given, whole[task])
    return whole


def _loss(task: str, given: Any) -> dict[str, Any]:
    name, args = _name_and_args(given, f"loss of {task}")
    found = Kind("loss", "fastmtl.losses").find(_with_suffix(name, _LOSSES, "Loss"), _LOSSES)
    if inspect.isfunction(found.value) and len(inspect.signature(found.value).parameters) >= 2 and not args:
        return {"loss_fn": found.value}
    made = _made(found.value, found.name, args, "loss")
    if not isinstance(made, AbsLoss | nn.Module):
        raise UsageError(
            f"{place_of(found.value, found.name)}: the loss {short_name(found.name)} must be an AbsLoss of "
            f"fastmtl.loss, an nn.Module, or a function of predictions and labels, it is a {type(made).__name__}."
        )
    return {"loss_fn": made}


def _metric(task: str, given: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    name, args = _name_and_args(given, f"metric of {task}")
    asked, better = args.pop("metrics", None), args.pop("weight", None)
    found = Kind("metric", "fastmtl.metrics").find(_with_suffix(name, _METRICS, "Metric"), _METRICS)
    made = _made(found.value, found.name, args, "metric")
    short = short_name(found.name)
    names, weight = _SCORES.get(found.name, ((short.removesuffix("Metric"),), None))
    if _is_of_torchmetrics(made):
        higher = made.higher_is_better
        weight = None if higher is None else (int(higher),)
        made = TorchMetric(made)
    if not isinstance(made, AbsMetric):
        raise UsageError(
            f"{place_of(found.value, found.name)}: the metric {short} must be an AbsMetric of fastmtl.metrics or a "
            f"metric of torchmetrics, it is a {type(made).__name__}."
        )
    names = asked or getattr(made, "metrics_names", names)
    weight = better if better is not None else getattr(made, "weight", weight)
    if weight is None:
        raise UsageError(
            f"metric of {task}: say whether more is better: metric: {{{task}: {{name: {name}, weight: [1]}}}}, with 0 "
            f"for less; or give {short} an attribute weight."
        )
    return {
        "metrics_fn": made,
        "metrics": list(names) if not isinstance(names, str) else [names],
        "weight": list(weight) if isinstance(weight, list | tuple) else [weight],
    }


def _is_of_torchmetrics(made: object) -> bool:
    return any(kind.__module__.startswith("torchmetrics") for kind in type(made).__mro__)


def _name_and_args(given: Any, what: str) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise UsageError(f"{what} must be a name, or a mapping with a name and arguments, got {given!r}.")
    return given["name"], {str(key): value for key, value in given.items() if key != "name"}


def _with_suffix(name: str, table: Mapping[str, Any], suffix: str) -> str:
    """Return ``"MSELoss"`` for ``"mse"`` too."""
    return known_name(name + suffix, table) or name


def _made(make: Any, name: str, args: Mapping[str, Any], what: str) -> Any:
    if not callable(make) or isinstance(make, nn.Module | AbsLoss | AbsMetric):
        return make
    try:
        return make(**args)
    except TypeError as error:
        raise UsageError(
            f"{place_of(make, name)}: the {what} {short_name(name)} cannot be made with "
            f"{dict(args) or 'no arguments'}: {error}."
        ) from error
