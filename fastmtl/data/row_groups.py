"""Parquet files larger than memory: rows are read by row groups, of which a few are held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastmtl.data.columns import as_arrays, parquet_files
from fastmtl.errors import UsageError

__all__ = ["Batch", "GroupedRows", "ParquetRows", "RowGroupSampler"]

Batch = tuple[dict[str, Tensor], dict[str, Tensor]]
# Makes inputs and labels, tensors (n, ...) by name, of n rows of columns.
Read = Callable[[dict[str, np.ndarray]], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]


class GroupedRows(Dataset[Batch]):
    """Rows that are made by groups, of which the ``held`` ones that were used last stay in memory.

    Args:
        sizes: Rows of each group, in order.
        held: Groups that stay in memory, at least 1.
    """

    def __init__(self, sizes: Sequence[int], held: int) -> None:
        if held < 1:
            raise UsageError(f"held must be at least 1 group of rows, got {held}.")
        self.sizes, self.held = list(sizes), held
        self._starts = np.cumsum([0, *self.sizes])
        self._groups: dict[int, Batch] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Batch:
        """Return one row."""
        inputs, labels = self.__getitems__([index])
        return {name: column[0] for name, column in inputs.items()}, {task: y[0] for task, y in labels.items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the rows ``indices``: inputs (b, ...) by name, and labels (b, ...) by task."""
        rows = np.asarray(indices)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        # Those in memory first, which the others push out.
        order = sorted(np.unique(groups).tolist(), key=lambda group: (group not in self._groups, group))
        places = [np.flatnonzero(groups == group) for group in order]
        parts: list[Batch] = []
        for group, at in zip(order, places, strict=True):
            taken = torch.from_numpy(rows[at] - self._starts[group])
            inputs, labels = self._group(group)
            parts.append(
                ({name: x[taken] for name, x in inputs.items()}, {task: y[taken] for task, y in labels.items()})
            )
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        inputs, labels = (
            {name: _joined([part[k][name] for part in parts])[back] for name in parts[0][k]} for k in (0, 1)
        )
        return inputs, labels

    def __getstate__(self) -> dict[str, Any]:
        # A worker reads what it needs.
        return {**self.__dict__, "_groups": {}}

    def _group(self, group: int) -> Batch:
        """Return a group of rows, which becomes the one used last."""
        found = self._groups.pop(group, None)
        if found is None:
            while len(self._groups) >= self.held:
                del self._groups[next(iter(self._groups))]
            found = self._made(group)
            _check_rows(found, self.sizes[group])
        self._groups[group] = found
        return found

    def _made(self, group: int) -> Batch:
        """Return a group of rows: inputs (n, ...) by name, and labels (n, ...) by task."""
        raise NotImplementedError


class ParquetRows(GroupedRows):
    """The rows of a Parquet file, or of all files of a folder, read by row groups.

    A batch is fetched at once, as of ``Columns``. Groups are made tensors when a row of them is needed; the ``held``
    ones that were used last stay in memory, with one more set of columns while it is read. In order, or in that of a
    `RowGroupSampler`, an epoch reads each group once in each worker of each process.

    Args:
        path: A file, a folder of files with the same columns, or a list of such files.
        read: Makes inputs and labels of the columns of some rows, arrays (n, ...) by name: lists are filled up with -1
            to the longest of their group, and of a batch; missing numbers are NaN.
        columns: The names of those to read; all if None.
        held: Groups that stay in memory, at least 1.

    Attributes:
        sizes: Rows of each group, in order.

    Raises:
        UsageError: There is no such file or column, it has no rows, or pyarrow is not installed.
    """

    def __init__(
        self, path: str | Path | Sequence[Path], read: Read, columns: Sequence[str] | None = None, held: int = 4
    ) -> None:
        self.read = read
        self.files, self.columns, self.places = parquet_files(path, columns)
        if not self.places:
            raise UsageError(f"{str(path)!r} has no rows.")
        super().__init__([rows for *_, rows in self.places], held)

    def _made(self, group: int) -> Batch:
        file, number, _ = self.places[group]
        inputs, labels = self.read(as_arrays(self.files[file], number, self.columns))
        return dict(inputs), dict(labels)


def _check_rows(group: Batch, rows: int) -> None:
    for part in group:
        for name, values in part.items():
            if len(values) != rows:
                raise UsageError(f"read must return {rows} rows of {name!r} for as many of columns, got {len(values)}.")


def _joined(parts: list[Tensor]) -> Tensor:
    """Return the rows of several groups; lists filled up with -1."""
    if parts[0].dim() == 2:
        width = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in parts]
    return torch.cat(parts)


class RowGroupSampler(Sampler[int]):
    """Each row once in an epoch: groups in random order, and the rows of ``mixed`` groups at a time in random order.

    As the order depends on the generator alone, a resumed run has the same one, and ``fastmtl.distributed.shard`` gives
    each process its part of every batch.

    Args:
        sizes: Rows of each group, as of ``ParquetRows.sizes``.
        mixed: Groups whose rows are mixed, at least 1, and at most as many as the rows hold.
        generator: What the order is drawn by.

    Example::

        rows = ParquetRows("clicks.parquet", read, held=4)
        sampler = RowGroupSampler(rows.sizes, mixed=4, generator=torch.Generator().manual_seed(0))
        loader = batch_loader(rows, 256, sampler=sampler)
    """

    def __init__(self, sizes: Sequence[int], mixed: int, generator: torch.Generator) -> None:
        if mixed < 1:
            raise UsageError(f"mixed must be at least 1 group of rows, got {mixed}.")
        self.sizes, self.mixed, self.generator = list(sizes), mixed, generator

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[int]:
        starts = np.cumsum([0, *self.sizes]).tolist()
        groups = torch.randperm(len(self.sizes), generator=self.generator)
        for some in groups.split(self.mixed):
            rows = torch.cat([torch.arange(starts[group], starts[group + 1]) for group in some.tolist()])
            yield from rows[torch.randperm(len(rows), generator=self.generator)].tolist()
