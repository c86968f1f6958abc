"""Which labels of a batch are present: how many entries, and of which tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.engine.trees import leaves
from fastmtl.loss import AbsLoss
from fastmtl.support.kinds import Tree

__all__ = ["are_complete", "is_overridden", "labelled_entries", "labelled_places", "present_tasks"]

# Entries of labels that are looked at together; of larger ones the first row nearly always has a label.
_MOST_LOOKED_AT = 2**16


def labelled_entries(loss: AbsLoss, labels: Tree) -> int | Tensor:
    """Return the divisor of a loss's sum over a batch, :meth:`AbsLoss.divisor`, as a scalar on the labels' device.

    It is 0 for None. Labels that are not a tensor are passed to the loss if its class overrides ``divisor`` or
    ``labelled`` and takes them. Otherwise the entries of several tensors are added; a list of other objects, such as a
    dictionary per image, counts its rows with a label.
    """
    if labels is None:
        return 0
    if isinstance(labels, Tensor):
        return loss.divisor(labels) if labels.dim() else 1
    divisor = _user_divisor(loss, labels)
    if divisor is not None:
        return divisor
    # A list of other objects has one entry per row.
    held = leaves(labels) if isinstance(labels, Mapping) else labels if isinstance(labels, list | tuple) else []
    counts = [labelled_entries(loss, entry) for entry in held if isinstance(entry, Tensor)]
    return sum(counts) if counts else sum(_has_label(loss, row) for row in _rows(labels))


def labelled_places(loss: AbsLoss, labels: Tensor) -> Tensor:
    """Return ``loss.labelled(labels)``, with a 1 for the channels that losses of this package leave out."""
    known = loss.labelled(labels)
    if known.dim() == labels.dim() - 1 and labels.dim() > 2 and not is_overridden(loss, "labelled"):
        return known.unsqueeze(1)
    return known


def present_tasks(losses: Mapping[str, AbsLoss], labels: Sequence[Mapping[str, Tree]]) -> list[int] | None:
    """Return the tasks that have a label in one of the batches of a step, whose labels are by task; None for all.

    Labels on a GPU count as present, as reading them would wait.
    """
    present = [
        t
        for t, (task, loss) in enumerate(losses.items())
        if any(task in of_batch and _has_any(loss, of_batch[task]) for of_batch in labels)
    ]
    return None if len(present) == len(losses) else present


def are_complete(losses: Mapping[str, AbsLoss], labels: Mapping[str, Tree]) -> bool:
    """Return True if one look at the labels of all tasks, small ones in the host's memory, shows that all are there."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    count = 0
    for task, loss in losses.items():
        gt = labels.get(task)
        if not isinstance(gt, Tensor) or not gt.is_cpu or gt.layout != torch.strided or not loss.marks_entries:
            return False
        size, dtype = gt.numel(), gt.dtype
        if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize == 1):
            return False
        count += size
        if not size or count > _MOST_LOOKED_AT:
            return False
        if not dtype.is_floating_point:
            if loss.ignore_index is None or (loss.ignore_index < 0 and not dtype.is_signed):
                continue
            if loss.ignore_index >= 0:
                return False
        by_dtype.setdefault(dtype, []).append(gt if gt.dim() == 1 else gt.reshape(-1))
    for dtype, flat in by_dtype.items():
        entries = torch.cat(flat)
        # A NaN shows in the sum, and a negative marker in the least entry.
        if not (math.isfinite(entries.sum().item()) if dtype.is_floating_point else entries.min().item() >= 0):
            return False
    return True


def _has_any(loss: AbsLoss, labels: Tree) -> bool:
    if any(isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in leaves(labels)):
        return True
    if isinstance(labels, Tensor):
        # Label maps are large, and the first row nearly always has a label.
        first = labels[:1] if labels.dim() else labels
        return bool(loss.labelled(first).any() or loss.labelled(labels).any())
    divisor = None if labels is None else _user_divisor(loss, labels)
    if divisor is not None:
        return bool(divisor > 0)
    rows = _rows(labels)
    return any(bool(_has_label(loss, row)) for row in rows) or rows == []


def _rows(labels: Tree) -> list[Any]:
    """Return the rows of labels that are not a tensor."""
    if isinstance(labels, list | tuple):
        return list(labels)
    if isinstance(labels, Mapping) or not hasattr(labels, "__len__"):
        return [labels]
    return [True] * len(labels)


def _has_label(loss: AbsLoss, row: Any) -> bool | Tensor:
    """Return whether a row is labelled: not None, and not only missing entries; an image without boxes is."""
    if row is None:
        return False
    entries = [leaf for leaf in leaves(row) if isinstance(leaf, Tensor) and leaf.numel()]
    if not entries:
        return True
    return sum(loss.labelled(entry).any() for entry in entries) > 0


def _user_divisor(loss: AbsLoss, labels: Tree) -> int | Tensor | None:
    """Return the divisor by a user's method for labels that are not a tensor; None if no method takes them."""
    for name in ("divisor", "labelled"):
        if not is_overridden(loss, name):
            continue
        try:
            value: Any = getattr(loss, name)(labels)
            # Comparing a list with a number gives a single bool, which has no meaning.
            if not isinstance(value, bool | np.bool_):
                return _count(value) if name == "labelled" else _number(value)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            # The method is written for tensors.
            continue
    return None


def _number(divisor: Any) -> int | Tensor:
    """Return a divisor that may be a number of numpy or Python, and need not be an integer."""
    return divisor if isinstance(divisor, int | Tensor) else torch.tensor(float(divisor), dtype=torch.float64)


def is_overridden(loss: AbsLoss, name: str) -> bool:
    """Return whether a method of a loss, or of the loss it wraps, is a user's."""
    inner: Any = getattr(loss, "inner", None)
    method = getattr(type(inner if hasattr(inner, "compute_loss") else loss), name, None)
    return method is not None and not method.__module__.startswith("fastmtl.")


def _count(known: Any) -> int | Tensor:
    if isinstance(known, Mapping):
        known = list(known.values())
    if isinstance(known, list | tuple):
        return sum(_count(part) for part in known)
    return known.sum() if isinstance(known, Tensor) else int(np.sum(known))
