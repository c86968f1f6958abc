"""Files of numbers with commas below one line of names, read some rows at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from fastmtl.errors import UsageError

__all__ = ["count_line_ends", "names_of", "rows_of"]

# Rows, and characters where lines are only counted, that are read at a time.
_ROWS, _CHARACTERS = 2**13, 2**20


def names_of(path: Path) -> list[str]:
    """Return the names in the first line of a file.

    Raises:
        UsageError: There is no such file, or nothing in it.
    """
    try:
        with path.open(newline="") as file:
            return next(csv.reader(file))
    except FileNotFoundError:
        raise UsageError(f"The data folder {str(path.parent)!r} has no file {path.name}.") from None
    except StopIteration:
        raise _no_numbers(path, "it is empty") from None


def count_line_ends(path: Path) -> int:
    """Return the number of line ends of any kind, which is that of the rows at least."""
    with path.open() as file:
        return sum(part.count("\n") for part in iter(lambda: file.read(_CHARACTERS), ""))


def rows_of(path: Path) -> Iterator[np.ndarray]:
    """Yield the numbers (n, columns) of some rows at a time, float64.

    Raises:
        UsageError: There are no rows, something is no number, or a row has another length than the names.
    """
    names, found = names_of(path), False
    with path.open() as file:
        next(file)
        # Empty lines are no rows.
        while lines := list(islice(filter(str.strip, file), _ROWS)):
            try:
                rows = np.loadtxt(lines, delimiter=",", dtype=np.float64, ndmin=2, comments=None)
            except ValueError:
                raise _no_numbers(path, _fault(lines, len(names))) from None
            if rows.shape[1] != len(names):
                raise _no_numbers(path, _fault(lines, len(names)))
            found = True
            yield rows
    if not found:
        raise _no_numbers(path, "it has no rows")


def _fault(lines: list[str], columns: int) -> str:
    """Return what is wrong with the first line that is no row."""
    for line in lines:
        fields = line.rstrip("\n").split(",")
        if len(fields) != columns:
            return f"{line[:40].rstrip()!r}... has {len(fields)} values below {columns} names"
        for field in fields:
            try:
                float(field)
            except ValueError:
                return f"{field!r} in the line {line[:40].rstrip()!r}..."
    return "a line that numpy cannot read"


def _no_numbers(path: Path, cause: str) -> UsageError:
    return UsageError(f"{str(path)!r} must be numbers with commas below one line of names ({cause}).")
