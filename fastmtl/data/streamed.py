"""Parquet files of columns that are read by groups of rows: what the data set ``parquet`` does with large ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmtl.data.columns import group_of_rows, parquet_files
from fastmtl.data.row_groups import ParquetRows, RowGroupSampler
from fastmtl.data.sources import values_of

__all__ = ["STREAMED_BYTES", "ParquetGroups", "StreamedColumns", "sampler_of"]

# Files that are larger together are read by groups of rows, unless the user says otherwise.
STREAMED_BYTES = 2**30
# The rows of as many groups as have so many bytes, one at least, are mixed and held.
_HELD_BYTES = 2**28


class ParquetGroups:
    """Rows of Parquet files, of which one group is in memory at a time.

    Attributes:
        files, places: As of `parquet_files`.
        held: Groups whose rows may be held together.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, self._names, self.places = parquet_files(files)
        self.places = [place for place in self.places if place[2]]
        self.sizes = [place[2] for place in self.places]
        largest = max((place[3] for place in self.places), default=1)
        self.held = max(1, min(len(self.places), _HELD_BYTES // max(largest, 1)))

    def __len__(self) -> int:
        return sum(self.sizes)

    def names(self) -> list[str]:
        """Return the names of the columns."""
        return list(self._names)

    def row(self, index: int) -> dict[str, Any]:
        """Return a row: its values by column."""
        for group, size in enumerate(self.sizes):
            if index < size:
                row: dict[str, Any] = self._table(group, self._names).slice(index, 1).to_pylist()[0]
                return row
            index -= size
        raise IndexError(index)

    def group(self, number: int, names: Sequence[str]) -> dict[str, Sequence[Any]]:
        """Return the values of columns in one group of rows."""
        table = self._table(number, names)
        return {name: values_of(table.column(name)) for name in names}

    def chunks(self, names: Sequence[str]) -> Iterator[dict[str, Sequence[Any]]]:
        """Yield the values of columns, group by group."""
        for number in range(len(self.sizes)):
            yield self.group(number, names)

    def column(self, name: str) -> Sequence[Any]:
        """Return the values of a column in all rows."""
        return [value for chunk in self.chunks([name]) for value in chunk[name]]

    def _table(self, number: int, names: Sequence[str]) -> Any:
        file, group, *_ = self.places[number]
        return group_of_rows(self.files[file], group, names)


class StreamedColumns(ParquetRows):
    """The rows of Parquet files as vectors (b, width) and labels by task, read by groups.

    Args:
        groups: The rows.
        names: The columns to read.
        make: Makes inputs and labels of the values of columns.
        held: Groups that stay in memory.
    """

    def __init__(
        self,
        groups: ParquetGroups,
        names: Sequence[str],
        make: Callable[[Mapping[str, Sequence[Any]]], tuple[Tensor, dict[str, Tensor]]],
        held: int,
    ) -> None:
        super().__init__(groups.files, _unused, names, held)
        self.groups, self.make = groups, make

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return the rows ``indices``: inputs (b, width), and labels (b, ...) by task."""
        inputs, labels = super().__getitems__(indices)
        return inputs["inputs"], labels

    def __getitem__(self, index: int) -> Any:
        """Return one row."""
        inputs, labels = self.__getitems__([index])
        return inputs[0], {task: label[0] for task, label in labels.items()}

    def _made(self, group: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs, labels = self.make(self.groups.group(group, self.columns))
        return {"inputs": inputs}, labels


def _unused(columns: Any) -> Any:
    raise AssertionError("values are read as they are, not as arrays")


def sampler_of(groups: ParquetGroups, rows: int | None, seed: int) -> RowGroupSampler:
    """Return what draws the first ``rows`` rows, all if None: those of some groups at a time in random order."""
    sizes, left = list[int](), len(groups) if rows is None else rows
    for size in groups.sizes:
        if left > 0:
            sizes.append(min(size, left))
        left -= size
    return RowGroupSampler(sizes, groups.held, torch.Generator().manual_seed(seed))
