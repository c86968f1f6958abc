"""Checks of the trainer's arguments: each raises one sentence that says what was got and what is allowed."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from fastmtl.architecture import AbsArchitecture
from fastmtl.distributed import Alone, Peers
from fastmtl.errors import BackendError, UsageError
from fastmtl.trainer.setup.tasks import TaskDict
from fastmtl.weighting import AbsWeighting

__all__ = [
    "check_arguments",
    "check_methods",
    "check_tasks",
    "check_weighting",
    "find_device",
    "make_folder",
]

# What LibMTL's trainer calls and fastmtl's does not, and what takes its place.
_NOT_CALLED = {
    "_process_data": "let the loader give (inputs, labels)",
    "_compute_loss": "give each task a loss derived from fastmtl.loss.AbsLoss",
    "_prepare_dataloaders": "hand the loaders to train and test",
    "forward4loss": "override process_preds, or give each task a loss derived from fastmtl.loss.AbsLoss",
}


def check_arguments(kwargs: Iterable[str], init: Callable[..., None]) -> None:
    """Refuse arguments that a constructor does not have, as nobody would read them."""
    names = [name for name in inspect.signature(init).parameters if name not in ("self", "kwargs")]
    for name in kwargs:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"Trainer has no argument {name!r}.{hint} Hyper-parameters go into weight_args and arch_args."
            )


def check_methods(trainer: object) -> None:
    """Refuse a trainer with methods of LibMTL's trainer that nobody would call here, and say what to do instead."""
    for method, instead in _NOT_CALLED.items():
        if hasattr(type(trainer), method):
            raise UsageError(f"{type(trainer).__name__} has a method {method}, which fastmtl does not call: {instead}.")


def find_device(device: str | int | torch.device | None, peers: Peers | None = None) -> torch.device:
    """Return the device that was asked for, or the best there is; with several processes, this one's GPU.

    Raises:
        UsageError: No name of a device.
        BackendError: The device is not there.
    """
    peers = peers or Alone()
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", peers.local_device(torch.device("cuda")).index or 0)
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device must be cpu, cuda, cuda:<index> or mps, got {device!r}.") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device must be cpu, cuda, cuda:<index> or mps, got {str(device)!r}.")
    absent = f"device is {device}, but torch {torch.__version__} finds no {{}} here; use --device cpu."
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(absent.format("CUDA GPU"))
        if chosen.index is not None and chosen.index >= torch.cuda.device_count():
            raise BackendError(f"device is {device}, but there are only {torch.cuda.device_count()} CUDA GPUs.")
        chosen = peers.local_device(chosen)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise BackendError(absent.format("MPS device"))
    return chosen


def make_folder(save_path: str | Path) -> Path:
    """Return the folder for checkpoints, made and tried now, as it would be too late after an epoch."""
    folder = Path(save_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise UsageError(f"save_path {str(save_path)!r} cannot be made: {cause.strerror}.") from cause
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"save_path {str(save_path)!r} cannot be written to.")
    return folder


def check_tasks(task_dict: TaskDict, decoders: Mapping[str, nn.Module] | nn.ModuleDict) -> list[str]:
    """Return the names of the tasks: at least one, each with all that describes it and a decoder."""
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


def check_weighting(model: AbsArchitecture, rule: type[AbsWeighting], architecture: str, rep_grad: bool) -> None:
    """Refuse a strategy that cannot balance what the model has, and say what it would need."""
    if rep_grad and not rule.allows_rep_grad:
        raise UsageError(f"{rule.__name__} balances the gradients of parameters: rep_grad must be False.")
    if rule.needs == "reps" and not rep_grad:
        raise UsageError(f"{rule.__name__} works on the gradients of representations: rep_grad must be True.")
    if rule.needs in ("gram", "rows", "reps") and not any(True for _ in model.get_share_params()):
        raise UsageError(
            f"{rule.__name__} balances the gradients of shared parameters, and {architecture} has none: use EW."
        )
