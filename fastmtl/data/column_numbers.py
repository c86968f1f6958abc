"""Columns of numbers, or of lists of numbers, as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.data.sources import Table
from fastmtl.errors import UsageError

__all__ = ["known_numbers", "moments", "no_value", "number_table", "numbers_of"]


def moments(rows: Table, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (width,) of the numbers of columns.

    Raises:
        UsageError: One is missing or is no number, or a row has more of them than another.
    """
    count, mean, square = 0, torch.zeros(0), torch.zeros(0)
    for part in rows.chunks(names):
        table = number_table([part[name] for name in names], names).double()
        if count and table.shape[1] != len(mean):
            raise _other_width(sorted([len(mean), table.shape[1]]))
        own, of_part = table.mean(0), len(table)
        shift = own - mean if count else torch.zeros_like(own)
        # Of all rows so far, by what the parts have: sums of squares about a mean grow by its shift.
        square = (
            (square if count else 0) + (table - own).square().sum(0) + shift**2 * count * of_part / (count + of_part)
        )
        mean = mean + shift * of_part / (count + of_part) if count else own
        count += of_part
    return mean.float(), (square / count).sqrt().float()


def number_table(columns: Sequence[Sequence[Any]], names: Sequence[str]) -> Tensor:
    """Return the numbers of columns, (n, width)."""
    if all(isinstance(values, np.ndarray) for values in columns):
        table = np.stack([np.asarray(values, dtype=np.float32) for values in columns], axis=1)
        if np.isfinite(table).all():
            return torch.from_numpy(table)
    parts = [[known_numbers(name, value) for value in values] for name, values in zip(names, columns, strict=True)]
    found = [np.concatenate(row) for row in zip(*parts, strict=True)]
    widths = sorted({len(row) for row in found})
    if len(widths) > 1:
        raise _other_width(widths)
    return torch.from_numpy(np.stack(found))


def _other_width(widths: Sequence[int]) -> UsageError:
    return UsageError(f"Every row must have as many numbers as inputs, got {' and '.join(map(str, widths[:2]))}.")


def known_numbers(column: str, value: Any) -> np.ndarray:
    """Return the numbers of a value that is an input."""
    numbers = numbers_of(column, value)
    if not np.isfinite(numbers).all():
        raise no_value(column, value)
    return numbers


def numbers_of(column: str, value: Any) -> np.ndarray:
    """Return the numbers of a value as one dimension of float32; a missing one is NaN."""
    try:
        return np.asarray(math.nan if value is None else value, dtype=np.float32).reshape(-1)
    except (TypeError, ValueError):
        raise UsageError(f"The column {column!r} must have numbers or lists of numbers, got {value!r}.") from None


def no_value(column: str, value: Any) -> UsageError:
    """Return the error of an input without a value."""
    got = "no value" if value is None else repr(value)
    return UsageError(f"The column {column!r} is an input and has {got} in a row: leave such rows out, or fill them.")
