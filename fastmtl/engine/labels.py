"""Which labels of a batch are there: how many entries, and of which tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.engine.trees import leaves
from fastmtl.loss import AbsLoss
from fastmtl.support.kinds import Tree

__all__ = ["labelled_entries", "labelled_places", "present_tasks"]


def labelled_entries(loss: AbsLoss, labels: Tree) -> int | Tensor:
    """Return what a loss divides its sum over a batch by, :meth:`AbsLoss.divisor`, as a scalar where the labels are.

    None stands for the labels of a task that has none. Labels that are no tensor are shown to the loss as they are if
    its class has a ``divisor`` or ``labelled`` of its own that takes them. Otherwise the entries of several tensors add
    up; a list of what is no tensor, such as a dictionary for each image, has as many as it has rows with a label.
    """
    if labels is None:
        return 0
    if isinstance(labels, Tensor):
        return loss.divisor(labels) if labels.dim() else 1
    told = _told_by(loss, labels)
    if told is not None:
        return told
    # A list may have an entry for each row, which is then what counts.
    held = leaves(labels) if isinstance(labels, Mapping) else labels if isinstance(labels, list | tuple) else []
    counts = [labelled_entries(loss, entry) for entry in held if isinstance(entry, Tensor)]
    return sum(counts) if counts else sum(_has_label(loss, row) for row in _rows(labels))


def labelled_places(loss: AbsLoss, labels: Tensor) -> Tensor:
    """Return ``loss.labelled(labels)``, with a 1 in place of the channels that a loss of this package leaves out."""
    known = loss.labelled(labels)
    if known.dim() == labels.dim() - 1 and labels.dim() > 2 and not _says_itself(loss, "labelled"):
        return known.unsqueeze(1)
    return known


def present_tasks(losses: Mapping[str, AbsLoss], labels: Sequence[Mapping[str, Tree]]) -> list[int] | None:
    """Return the tasks that have a label in the batches of a step, None for all of them.

    Labels are read where they are in the host's memory. On a GPU, where that would wait, they count as being there.

    Args:
        losses: The loss of each task.
        labels: The labels by task, batch by batch.
    """
    present = [
        t
        for t, (task, loss) in enumerate(losses.items())
        if any(task in of_batch and _has_any(loss, of_batch[task]) for of_batch in labels)
    ]
    return None if len(present) == len(losses) else present


def _has_any(loss: AbsLoss, labels: Tree) -> bool:
    if any(isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in leaves(labels)):
        return True
    if isinstance(labels, Tensor):
        # Maps of labels are large, and the first one nearly always has some.
        first = labels[:1] if labels.dim() else labels
        return bool(loss.labelled(first).any() or loss.labelled(labels).any())
    told = None if labels is None else _told_by(loss, labels)
    if told is not None:
        return bool(told > 0)
    rows = _rows(labels)
    return any(bool(_has_label(loss, row)) for row in rows) or rows == []


def _rows(labels: Tree) -> list[Any]:
    """Return the rows of labels that are no tensor."""
    if isinstance(labels, list | tuple):
        return list(labels)
    if isinstance(labels, Mapping) or not hasattr(labels, "__len__"):
        return [labels]
    return [True] * len(labels)


def _has_label(loss: AbsLoss, row: Any) -> bool | Tensor:
    """Return whether a row is labelled, as an image without any box is too: all that it lacks is what is missing."""
    if row is None:
        return False
    entries = [leaf for leaf in leaves(row) if isinstance(leaf, Tensor) and leaf.numel()]
    if not entries:
        return True
    return sum(loss.labelled(entry).any() for entry in entries) > 0


def _told_by(loss: AbsLoss, labels: Tree) -> int | Tensor | None:
    """Return what a user's own method says of labels that are no tensor; None if there is none that takes them."""
    for name in ("divisor", "labelled"):
        if not _says_itself(loss, name):
            continue
        try:
            told: Any = loss.divisor(labels) if name == "divisor" else loss.labelled(labels)
            # A comparison of a list with a number is a single bool, and says nothing.
            if isinstance(told, bool | np.bool_):
                continue
            return _count(told) if name == "labelled" else told if isinstance(told, Tensor) else _number(told)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            # It is written for tensors.
            continue
    return None


def _number(told: Any) -> int | Tensor:
    """Return what a divisor says in numpy or Python's numbers, which need not be whole."""
    return told if isinstance(told, int) else torch.tensor(float(told), dtype=torch.float64)


def _says_itself(loss: AbsLoss, name: str) -> bool:
    """Return whether a method of a loss, or of the one that it stands for, is a user's."""
    inner: Any = getattr(loss, "inner", None)
    method = getattr(type(inner if hasattr(inner, "compute_loss") else loss), name, None)
    return method is not None and not method.__module__.startswith("fastmtl.")


def _count(known: Any) -> int | Tensor:
    if isinstance(known, Mapping):
        known = list(known.values())
    if isinstance(known, list | tuple):
        return sum(_count(part) for part in known)
    return known.sum() if isinstance(known, Tensor) else int(np.sum(known))
