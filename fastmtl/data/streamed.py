"""Parquet files of columns that are read by groups of rows: what the data set ``parquet`` does with large ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmtl.data.columns import group_of_rows, parquet_files
from fastmtl.data.row_groups import Batch, GroupedRows, RowGroupSampler
from fastmtl.data.sources import Table, values_of

__all__ = ["STREAMED_BYTES", "Make", "ParquetGroups", "StreamedColumns", "groups_held", "sampler_of"]

# Files that are larger together are read by groups of rows, unless the user says otherwise.
STREAMED_BYTES = 2**30
# The rows of as many groups as have so many bytes as tensors, one at least, are mixed and held.
_HELD_BYTES = 2**28

# Makes inputs (n, width) and labels (n, ...) by task of the values of n rows by column.
Make = Callable[[Mapping[str, Sequence[Any]]], tuple[Tensor, dict[str, Tensor]]]


class ParquetGroups(Table):
    """Rows of Parquet files, of which one group is in memory at a time.

    Attributes:
        sizes: Rows of each group, in order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._names, self._places = parquet_files(files)
        self.sizes = [rows for *_, rows in self._places]
        self._first: dict[str, Any] = {}

    def __len__(self) -> int:
        return sum(self.sizes)

    def names(self) -> list[str]:
        """Return the names of the columns."""
        return list(self._names)

    def first(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the values of columns in the first row, each of which is read once."""
        unread = [name for name in names if name not in self._first]
        if unread:
            self._first |= self._table(0, unread).slice(0, 1).to_pylist()[0]
        return {name: self._first[name] for name in names}

    def group(self, number: int, names: Sequence[str]) -> dict[str, Sequence[Any]]:
        """Return the values of columns in one group of rows."""
        table = self._table(number, names)
        return {name: values_of(table.column(name)) for name in names}

    def chunks(self, names: Sequence[str]) -> Iterator[dict[str, Sequence[Any]]]:
        """Yield the values of columns, group by group."""
        for number in range(len(self.sizes)):
            yield self.group(number, names)

    def _table(self, number: int, names: Sequence[str]) -> Any:
        file, group, _ = self._places[number]
        return group_of_rows(self._files[file], group, names)


class StreamedColumns(GroupedRows):
    """The rows of Parquet files as vectors (b, width) and labels by task, read by groups.

    Args:
        groups: The rows.
        names: The columns to read.
        make: Makes inputs and labels of the values of columns.
        held: Groups that stay in memory.
    """

    def __init__(self, groups: ParquetGroups, names: Sequence[str], make: Make, held: int) -> None:
        super().__init__(groups.sizes, held)
        self.groups, self.names, self.make = groups, names, make

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return the rows ``indices``: inputs (b, width), and labels (b, ...) by task."""
        inputs, labels = super().__getitems__(indices)
        return inputs["inputs"], labels

    def __getitem__(self, index: int) -> Any:
        """Return one row."""
        inputs, labels = self.__getitems__([index])
        return inputs[0], {task: label[0] for task, label in labels.items()}

    def _made(self, group: int) -> Batch:
        inputs, labels = self.make(self.groups.group(group, self.names))
        return {"inputs": inputs}, labels


def groups_held(groups: ParquetGroups, names: Sequence[str], make: Make) -> int:
    """Return of how many groups the tensors have 256 MiB at most, all being as long as the longest; at least 1."""
    inputs, labels = make({name: [value] for name, value in groups.first(names).items()})
    of_row = sum(values.nbytes for values in (inputs, *labels.values()))
    return max(1, min(len(groups.sizes), _HELD_BYTES // (max(groups.sizes) * of_row)))


def sampler_of(groups: ParquetGroups, rows: int, mixed: int, seed: int) -> RowGroupSampler:
    """Return what draws the first ``rows`` rows: those of ``mixed`` groups at a time in random order."""
    sizes, left = list[int](), rows
    for size in groups.sizes:
        if left > 0:
            sizes.append(min(size, left))
        left -= size
    return RowGroupSampler(sizes, mixed, torch.Generator().manual_seed(seed))
