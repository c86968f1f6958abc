"""Which labels of a batch are there: by row, by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastmtl.engine.trees import leaves
from fastmtl.loss import AbsLoss

__all__ = ["labelled_entries", "labelled_rows", "present_tasks"]


def labelled_rows(loss: AbsLoss, labels: Any) -> int | Tensor:
    """Return how many rows of a batch have a label, as a scalar on the device where the labels are tensors."""
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        return len(labels) if hasattr(labels, "__len__") else 1
    known = _known(loss, labels)
    return (known if known.dim() == 1 else known.reshape(len(known), -1).any(1)).sum()


def labelled_entries(loss: AbsLoss, labels: Any) -> int | Tensor:
    """Return how many entries of a batch's labels a loss averages over, as :func:`labelled_rows` does the rows.

    None stands for the labels of a task that has none. Of several tensors the entries add up; a list of what is no
    tensor, such as a dictionary for each image, has as many as it is long.
    """
    if labels is None:
        return 0
    if isinstance(labels, Tensor):
        return _known(loss, labels).sum() if labels.dim() else 1
    # A list may have an entry for each row, which is then what counts.
    held = leaves(labels) if isinstance(labels, Mapping) else labels if isinstance(labels, list | tuple) else []
    counts = [labelled_entries(loss, each) for each in held if isinstance(each, Tensor)]
    return sum(counts) if counts else labelled_rows(loss, labels)


def present_tasks(losses: Mapping[str, AbsLoss], labels: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Return the tasks that have a label in the batches of a step, None for all of them.

    Labels are read where they are in the host's memory. On a GPU, where that would wait, they count as being there.

    Args:
        losses: The loss of each task.
        labels: The labels by task, batch by batch.
    """
    found = [
        t
        for t, (task, loss) in enumerate(losses.items())
        if any(task in each and _has_any(loss, each[task]) for each in labels)
    ]
    return None if len(found) == len(losses) else found


def _has_any(loss: AbsLoss, labels: Any) -> bool:
    if not isinstance(labels, Tensor) or labels.device.type != "cpu":
        return labels is not None
    # Maps of labels are large, and the first one nearly always has some.
    return bool(_known(loss, labels[:1] if labels.dim() else labels).any() or _known(loss, labels).any())


def _known(loss: AbsLoss, labels: Tensor) -> Tensor:
    # Losses written for LibMTL derive from a class of its own.
    return loss.labelled(labels) if hasattr(loss, "labelled") else AbsLoss().labelled(labels)
