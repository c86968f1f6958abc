"""Cutting batches apart and putting them together, whatever containers their tensors are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["halves", "joined"]


def halves(batch: tuple[Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return the first and the second half of a batch; a single row is both."""
    leaves: list[Tensor] = []

    def half(value: Any, second: bool) -> Any:
        if isinstance(value, Tensor):
            leaves.append(value)
            middle = len(value) // 2
            return value[middle:] if second else value[:middle]
        if isinstance(value, Mapping):
            return {key: half(each, second) for key, each in value.items()}
        if value is None:
            return None
        return type(value)(half(each, second) for each in value)

    inputs, labels = batch
    found = (half(inputs, False), half(labels, False)), (half(inputs, True), half(labels, True))
    return (batch, batch) if min(map(len, leaves)) == 1 else found


def joined(parts: Sequence[Any]) -> Any:
    """Return the labels or predictions of several batches as those of one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([part.detach() for part in parts])
    if isinstance(first, Mapping):
        return {key: joined([part[key] for part in parts]) for key in first}
    return type(first)(map(joined, zip(*parts, strict=True)))
