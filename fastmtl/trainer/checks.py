"""Checks of the trainer's arguments: each raises one sentence that says what was got and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastmtl.errors import BackendError, UsageError
from fastmtl.weighting import AbsWeighting

__all__ = ["check_momentum", "check_sampling", "check_tasks", "find_device", "solve_interval"]


def find_device(device: str | torch.device | None) -> torch.device:
    """Return the device that was asked for, or the best there is.

    Raises:
        UsageError: No name of a device.
        BackendError: The device is not there.
    """
    if device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device must be cpu, cuda, cuda:<index> or mps, got {device!r}.") from None
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(
                f"device is {device}, but torch {torch.__version__} finds no CUDA GPU here; use --device cpu."
            )
        if found.index is not None and found.index >= torch.cuda.device_count():
            raise BackendError(f"device is {device}, but there are only {torch.cuda.device_count()} CUDA GPUs.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise BackendError(
            f"device is {device}, but torch {torch.__version__} finds no MPS device here; use --device cpu."
        )
    return found


def check_momentum(given: float) -> float:
    """Return the decay of the moving average of the weights.

    Raises:
        UsageError: It is not at least 0 and below 1.
    """
    if not 0 <= given < 1:
        raise UsageError(f"weight_momentum must be at least 0 and below 1, got {given}.")
    return given


def check_tasks(task_dict: dict[str, dict[str, Any]], decoders: Mapping[str, nn.Module] | nn.ModuleDict) -> list[str]:
    """Return the names of the tasks.

    Raises:
        UsageError: There are none, or one is described incompletely or has no decoder.
    """
    if not task_dict:
        raise UsageError("task_dict has no tasks.")
    for task, info in task_dict.items():
        for key in ("metrics", "metrics_fn", "loss_fn", "weight"):
            if key not in info:
                raise UsageError(f"task_dict[{task!r}] has no {key!r}.")
        if len(info["metrics"]) != len(info["weight"]):
            raise UsageError(
                f"task_dict[{task!r}] needs one weight per metric, got {len(info['metrics'])} metrics and "
                f"{len(info['weight'])} weights."
            )
        if task not in decoders:
            raise UsageError(f"decoders has no module for the task {task!r}.")
    return list(task_dict)


def solve_interval(model: Any, weighting: str, hyper: Mapping[str, Any], given: int) -> int:
    """Return the steps between two solves, from the trainer's option or the strategy's own of the same name.

    Raises:
        UsageError: The strategy's weights cannot be held.
    """
    if given < 1:
        raise UsageError(f"update_weights_every must be at least 1, got {given}.")
    interval = max(given, hyper.get("update_weights_every", 1))
    one_gram = model.needs == "gram" and model.samples == 1 and model.groups(**hyper) is None
    if interval > 1 and not one_gram:
        raise UsageError(
            f"update_weights_every must be 1 for {weighting}: its weights do not come from one Gram matrix."
        )
    return interval


def check_sampling(model: Any, weighting: str, given: int | None, refused: Mapping[str, bool]) -> int | None:
    """Return the tasks of a step if they are not all.

    Args:
        model: The model.
        weighting: Name of its strategy.
        given: The tasks of a step.
        refused: Options that cannot be on with sampled tasks, and whether they are.

    Raises:
        UsageError: Tasks cannot be sampled in this run.
    """
    if given is None or given == model.task_num:
        return None
    if not 1 <= given <= model.task_num:
        raise UsageError(f"tasks_per_step must be 1 to {model.task_num}, the number of tasks, got {given}.")
    reasons = {
        **refused,
        f"{weighting}, which is written for all tasks": model.backward.__func__ is not AbsWeighting.backward,
        f"{weighting}, whose own parameters are trained together": hasattr(model, "loss_scale"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(f"tasks_per_step cannot be combined with {reason}.")
    return given
