"""The labelled part of a batch, for metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.kinds import Tree

__all__ = ["has_partial_rows", "labelled_part", "labelled_rows", "marked"]


def marked(gt: Tensor, known: Tensor, marker: float) -> Tensor:
    """Return labels with a marker where they are missing; never waits for the device.

    Args:
        gt: Labels.
        known: Where they are there, on their device: of the same shape, without the channels, or by row.
        marker: What stands for a missing label.
    """
    if known.dim() == gt.dim() - 1 and known.shape[1:] == gt.shape[2:]:
        known = known.unsqueeze(1)
    elif known.dim() != gt.dim():
        known = known.reshape(len(known), -1).any(1).reshape(-1, *[1] * (gt.dim() - 1))
    if not gt.is_floating_point():
        gt = gt.to(wide_dtype(gt.device)) if math.isnan(marker) else gt.long()
    return torch.where(known, gt, marker)


def has_partial_rows(known: Tensor) -> bool:
    """Return whether some row has some of its labels only."""
    by_row = known.reshape(len(known), -1)
    return not torch.equal(by_row.any(1), by_row.all(1))


def labelled_rows(values: Any, known: Tensor) -> Tree:
    """Return the rows of predictions or labels that have a label; those of each tensor in a container."""
    if isinstance(values, Mapping):
        return {key: labelled_rows(value, known) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(labelled_rows(value, known) for value in values)
    if not isinstance(values, Tensor) or values.dim() == 0 or len(values) != len(known):
        return values
    return _taken(values, known.reshape(len(known), -1).any(1))


def labelled_part(pred: Tree, gt: Tensor, known: Tensor) -> tuple[Tree, Tensor]:
    """Return the labelled part of a batch: its rows where they are labelled or not as a whole, else its entries.

    Entries are one dimension: labels ``(n,)`` and predictions ``(n,)``, or ``(n, channels)`` where they have channels.

    Args:
        pred: Predictions.
        gt: Labels.
        known: Where labels are there, where looking at it does not wait: of the same shape, or without the channels.

    Raises:
        UsageError: Predictions are such that their entries do not belong to those of the labels.
    """
    if not has_partial_rows(known):
        return labelled_rows(pred, known), labelled_rows(gt, known)
    return _entries(pred, known), _entries(gt, known)


def _entries(values: Any, known: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        if values.shape == known.shape or (len(values) == len(known) and values.numel() == known.numel()):
            return _taken(values.reshape(-1), known.reshape(-1))
        if values.dim() > 1 and values.shape[:1] + values.shape[2:] == known.shape:
            values = values.movedim(1, -1)
        if values.shape[:-1] == known.shape:
            return _taken(values.reshape(-1, values.shape[-1]), known.reshape(-1))
    got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    raise UsageError(
        f"Some labels of a row are missing, labels of shape {tuple(known.shape)}, and a metric needs the predictions "
        f"for the others, which those of {got} cannot be taken apart into: let the metric skip missing labels itself "
        "and say so, by its attribute missing."
    )


def _taken(values: Tensor, known: Tensor) -> Tensor:
    """Return the rows of which a vector of booleans, in the host's memory, says that they are there."""
    return values.index_select(0, known.nonzero().flatten().to(values.device, non_blocking=True))
