"""The values of one row of a table, as a user gives it, as tensors without a batch dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["category", "numbers", "whole_numbers"]


def numbers(row: Mapping[str, Any], column: str, width: int | None = None) -> Tensor:
    """Return the number in a column, or ``width`` of them, as float32.

    Raises:
        UsageError: There is no such column, or no such numbers in it.
    """
    values = _value(row, column)
    given = values if isinstance(values, list | tuple) and width is not None else [values]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in given):
        raise UsageError(
            f"The column {column!r} must have {'a number' if width is None else 'numbers'}, got {values!r}."
        )
    if width is not None and len(given) != width:
        raise UsageError(f"The column {column!r} must have {width} numbers, got {len(given)}.")
    found = torch.tensor(given, dtype=torch.float32)
    return found[0] if width is None else found


def whole_numbers(row: Mapping[str, Any], column: str, size: int, most: int | None = None) -> Tensor:
    """Return the number below ``size`` in a column as int64; or up to ``most`` of them, with -1 for those that lack.

    Raises:
        UsageError: There is no such column, or no such numbers in it.
    """
    values = _value(row, column)
    given = list(values) if isinstance(values, list | tuple) and most is not None else [values]
    if not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size for value in given):
        raise UsageError(f"The column {column!r} must have whole numbers from 0 to {size - 1}, got {values!r}.")
    if most is None:
        return torch.tensor(given[0])
    if len(given) > most:
        raise UsageError(f"The column {column!r} must have at most {most} numbers, got {len(given)}.")
    return torch.tensor([*given, *[-1] * (most - len(given))])


def category(row: Mapping[str, Any], column: str, names: Sequence[str]) -> Tensor:
    """Return the place of a column's value among the names of its categories.

    Raises:
        UsageError: There is no such column, or it has another value.
    """
    value = _value(row, column)
    if value not in names:
        raise UsageError(f"The column {column!r} has {value!r}, which is none of {', '.join(list(names)[:10])}.")
    return torch.tensor(names.index(value))


def _value(row: Mapping[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise UsageError(f"A row has no value of the column {column!r}, only of {', '.join(row) or 'none'}.")
    return row[column]
