"""The labelled part of a batch, for metrics.

``known`` are booleans that say where labels are present, in a shape that :func:`~fastmtl.support.shapes.lined_up`
takes; others raise a ``UsageError``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.kinds import Tree
from fastmtl.support.shapes import lined_up

__all__ = ["has_partial_rows", "labelled_part", "labelled_rows", "marked"]


def marked(gt: Tensor, known: Tensor, marker: float) -> Tensor:
    """Return labels with ``marker`` where they are missing; never waits for the device."""
    known = lined_up(known, gt)
    if not gt.is_floating_point():
        gt = gt.to(wide_dtype(gt.device)) if math.isnan(marker) else gt.long()
    return torch.where(known, gt, marker)


def has_partial_rows(known: Tensor) -> bool:
    """Return whether some row has some, but not all, of its labels."""
    by_row = known.reshape(len(known), -1)
    return not torch.equal(by_row.any(1), by_row.all(1))


def labelled_rows(values: Any, known: Tensor) -> Tree:
    """Return the labelled rows of predictions or labels, which may be tensors in containers."""
    if isinstance(values, Mapping):
        return {key: labelled_rows(value, known) for key, value in values.items()}
    if isinstance(values, list | tuple):
        parts = [labelled_rows(value, known) for value in values]
        return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)
    if not isinstance(values, Tensor) or values.dim() == 0 or len(values) != len(known):
        return values
    return _taken(values, known.reshape(len(known), -1).any(1))


def labelled_part(pred: Tree, gt: Tensor, known: Tensor) -> tuple[Tree, Tensor]:
    """Return the labelled part of a batch: whole rows, or entries where a row has only some of them.

    Entries are ``(n,)`` labels and predictions, which are ``(n, channels)`` where they have channels. ``known`` is in
    the host's memory.

    Raises:
        UsageError: The entries of the predictions cannot be assigned to those of the labels.
    """
    if not has_partial_rows(known):
        return labelled_rows(pred, known), labelled_rows(gt, known)
    known = lined_up(known, gt)
    left_out = [place for place, size in enumerate(gt.shape) if known.shape[place] != size]
    if len(left_out) > 1:
        raise UsageError(
            f"Some rows have only some of their labels, of shape {tuple(gt.shape)}, and labelled(gt) of the task's "
            f"loss has shape {tuple(known.shape)}: it may leave out one dimension, not {len(left_out)}."
        )
    places = [1, -1]
    if left_out:
        known, places = known.squeeze(left_out[0]), [left_out[0]]
    taken = _entries(gt, known, places)
    # Predictions with other channels than the labels have them in dimension 1, or in the last one.
    alike = isinstance(pred, Tensor) and pred.dim() == gt.dim()
    return _entries(pred, known, places if alike else [1, -1]), taken


def _entries(values: Any, known: Tensor, places: Sequence[int]) -> Tensor:
    """Return the labelled entries of values shaped like ``known``, but for channels in one of the ``places``."""
    if isinstance(values, Tensor):
        if values.shape == known.shape or (len(values) == len(known) and values.numel() == known.numel()):
            return _taken(values.reshape(-1), known.reshape(-1))
        for place in places if values.dim() > 1 else ():
            moved = values.movedim(place, -1)
            if moved.shape[:-1] == known.shape:
                return _taken(moved.reshape(-1, moved.shape[-1]), known.reshape(-1))
    got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    raise UsageError(
        f"Some rows have only some of their labels, of shape {tuple(known.shape)}, and the predictions, of {got}, "
        "cannot be selected entry by entry: let the metric skip missing labels itself, and set its attribute missing "
        "to the label that it skips."
    )


def _taken(values: Tensor, known: Tensor) -> Tensor:
    """Return the rows selected by a vector of booleans in the host's memory."""
    return values.index_select(0, known.nonzero().flatten().to(values.device, non_blocking=True))
