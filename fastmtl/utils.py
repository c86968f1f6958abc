"""Seeds, devices, parameters and the improvement over a baseline."""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError

__all__ = ["count_improvement", "count_parameters", "get_root_dir", "set_device", "set_param", "set_random_seed"]


def get_root_dir() -> str:
    """Return the folder that contains the ``examples`` folder of the running script; fastmtl's parent folder otherwise.

    LibMTL's examples read files below it, such as ``examples/office/data_txt``.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    for folder in Path(script).resolve().parents if script else ():
        if folder.name == "examples":
            return str(folder.parent)
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def set_random_seed(seed: int = 0) -> None:
    """Seed Python, numpy and torch on all devices, and make cuDNN choose deterministic algorithms."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def set_device(gpu_id: str | int = "0") -> None:
    """Make only these GPUs (``"0"``, ``"0,1"``) visible; to be called before CUDA is used.

    Raises:
        UsageError: CUDA is already in use with other GPUs visible.
    """
    gpu_id = str(gpu_id)
    if torch.cuda.is_initialized() and os.environ.get("CUDA_VISIBLE_DEVICES") != gpu_id:
        raise UsageError(
            f"set_device({gpu_id!r}) comes too late: CUDA is already in use; call it before any CUDA work."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu_id


def count_parameters(model: nn.Module) -> None:
    """Print the numbers of all, trainable and non-trainable parameters of ``model``."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    print("=" * 40)
    print("Total Params:", trainable + frozen)
    print("Trainable Params:", trainable)
    print("Non-trainable Params:", frozen)


def set_param(curr_mod: nn.Module, name: str, param: Tensor | None = None, mode: str = "update") -> Tensor | None:
    """Replace the parameter ``name`` by any tensor, or return it with ``mode="get"``.

    Raises:
        UsageError: There is no such parameter, or no such mode.
    """
    if mode not in ("update", "get"):
        raise UsageError(f"mode must be update or get, got {mode!r}.")
    path, _, last = name.rpartition(".")
    try:
        owner = curr_mod.get_submodule(path)
        current = getattr(owner, last)
    except AttributeError:
        raise UsageError(f"{type(curr_mod).__name__} has no parameter {name!r}.") from None
    if mode == "get":
        return current
    # Modules refuse to replace a parameter by a plain tensor.
    delattr(owner, last)
    setattr(owner, last, param)
    return None


def count_improvement(
    base_result: Mapping[str, Sequence[float]],
    new_result: Mapping[str, Sequence[float]],
    weight: Mapping[str, Sequence[int]],
) -> float:
    """Return the relative improvement of ``new_result`` over ``base_result``, as a fraction (0.01 is one percent).

    With B the baseline's scores, N the new ones and s = -1 where higher is better, 1 elsewhere::

        mean over the tasks t of mean over the metrics m of s_tm (B_tm - N_tm) / |B_tm|

    Where a baseline score is exactly 0 the difference is divided by 1. Baseline scores of NaN are left out, as are
    tasks without any other; a new score of NaN makes the improvement NaN.

    Args:
        base_result: The baseline's scores B by task, one per metric.
        new_result: The scores N by task, one per metric.
        weight: By task, per metric: 1 (higher is better) or 0 (lower is better).

    Raises:
        UsageError: The three do not have the same tasks and numbers of metrics.

    Example::

        count_improvement({"A": [96, 98], "B": [0.2]}, {"A": [93, 99], "B": [0.5]}, {"A": [1, 0], "B": [1]})
    """
    if not base_result:
        raise UsageError("base_result has no tasks.")
    improvements = []
    for task, base_scores in base_result.items():
        if task not in new_result or task not in weight:
            raise UsageError(f"new_result and weight must have the tasks of base_result, task {task!r} is missing.")
        base, new, higher = (np.asarray(x, dtype=float) for x in (base_scores, new_result[task], weight[task]))
        if not base.shape == new.shape == higher.shape or base.size == 0:
            raise UsageError(
                f"Task {task!r} needs equally many base results, new results and weights, at least one, "
                f"got {base.size}, {new.size} and {higher.size}."
            )
        scale = np.where(base == 0, 1.0, np.abs(base))
        known = ~np.isnan(base)
        if known.any():
            improvements.append((np.where(higher == 1, new - base, base - new) / scale)[known].mean())
    return float(np.mean(improvements)) if improvements else math.nan
