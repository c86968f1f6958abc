"""Tables in memory: columns as inputs and labels, values numbered by a vocabulary, Parquet files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmtl.errors import UsageError

__all__ = ["Columns", "Vocabulary", "as_arrays", "given", "group_of_rows", "parquet_files", "read_parquet"]


class Columns(Dataset[tuple[dict[str, Tensor], dict[str, Tensor]]]):
    """Rows of a table; a batch is one vectorised fetch, as dictionaries by column and by task.

    ``__getitems__`` returns whole batches, so the loader must not collate: see ``fastmtl.data.tensors.batch_loader``.

    Args:
        inputs: Columns (n, ...) that a network reads, by name.
        labels: Labels (n, ...) by task; NaN where one is missing.

    Raises:
        UsageError: No column, or columns of several lengths.
    """

    def __init__(self, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> None:
        self.inputs, self.labels = dict(inputs), dict(labels)
        lengths = {name: len(column) for name, column in (*self.inputs.items(), *self.labels.items())}
        if not self.inputs or len(set(lengths.values())) != 1:
            raise UsageError(f"The columns of a table must have one length, and there must be some, got {lengths}.")
        self._rows = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return one row."""
        inputs, labels = self.__getitems__([index])
        return {name: column[0] for name, column in inputs.items()}, {task: y[0] for task, y in labels.items()}

    def __getitems__(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the rows ``indices``: columns (b, ...) by name, and labels (b, ...) by task."""
        rows = torch.as_tensor(indices)
        return (
            {name: column[rows] for name, column in self.inputs.items()},
            {task: label[rows] for task, label in self.labels.items()},
        )


def given(labels: Mapping[str, Tensor], conditions: Mapping[str, str]) -> dict[str, Tensor]:
    """Return labels in which a task's is missing, NaN, where that of another task is not 1.

    With ``{"conversion": "click"}`` conversions count where there was a click, for a model of pCVR on clicks; a missing
    label of the other task makes this one missing too.

    Args:
        labels: Labels of one shape by task.
        conditions: Task to the task on which its label depends.

    Raises:
        UsageError: A task without labels, or labels of two shapes.
    """
    masked = dict(labels)
    for task, other in conditions.items():
        for name in (task, other):
            if name not in labels:
                raise UsageError(f"given needs the labels of {name}, there are those of {', '.join(labels)}.")
        if labels[task].shape != labels[other].shape:
            raise UsageError(
                f"The labels of {task} and {other} must have one shape, got {tuple(labels[task].shape)} and "
                f"{tuple(labels[other].shape)}."
            )
        values = labels[task] if labels[task].is_floating_point() else labels[task].float()
        masked[task] = torch.where(labels[other] == 1, values, torch.nan)
    return masked


class Vocabulary:
    """Numbers for the values of a column: 0, 1, ... by falling frequency, and further ones for values not seen.

    Values that are not known share ``unseen`` numbers, by a hash of their text that is the same in every process.

    Args:
        values: A column of texts or integers; booleans are 0 and 1.
        most: The greatest number of known values; the most frequent ones are kept. All if None.
        unseen: How many numbers the others share, at least 1.

    Attributes:
        known: The known values, in the order of their numbers.
        size: How many numbers there are, for ``fastmtl.model.Categorical``.

    Raises:
        UsageError: ``most`` or ``unseen`` is below 1.
    """

    def __init__(self, values: Any, most: int | None = None, unseen: int = 1) -> None:
        for name, number in (("most", most), ("unseen", unseen)):
            if number is not None and number < 1:
                raise UsageError(f"{name} of a vocabulary must be at least 1, got {number}.")
        distinct, counts = np.unique(_as_array(values), return_counts=True)
        # Equally frequent values are in the order of their texts or numbers.
        order = np.argsort(-counts, kind="stable")[:most]
        self.known = distinct[order]
        self.unseen = unseen
        self.size = len(self.known) + unseen
        # Python's integers are equal across dtypes, and never to a text.
        self._numbers: dict[int | str, int] = {value: number for number, value in enumerate(self.known.tolist())}

    def encode(self, values: Any) -> Tensor:
        """Return the numbers, int64 of the shape of the values."""
        column = _as_array(values)
        distinct, inverse = np.unique(column, return_inverse=True)
        numbers = np.fromiter((self._number(value) for value in distinct.tolist()), np.int64, len(distinct))
        return torch.from_numpy(numbers[inverse].reshape(column.shape))

    def _number(self, value: int | str) -> int:
        known = self._numbers.get(value)
        return len(self.known) + zlib.crc32(str(value).encode()) % self.unseen if known is None else known


def _as_array(values: Any) -> np.ndarray:
    column = values.numpy() if isinstance(values, Tensor) else np.asarray(values)
    if column.dtype.kind == "O":
        if any(value is None or value != value for value in column.flat):
            raise UsageError("A vocabulary takes texts or integers, got a missing value: fill it in first.")
        # Pandas keeps integers and booleans as objects where both are in one column.
        numbers = all(isinstance(value, int | np.integer | np.bool_) for value in column.flat)
        column = np.array(column.tolist()) if numbers else column.astype(str)
    if column.dtype.kind == "b":
        column = column.astype(np.int64)
    if column.dtype.kind not in "iuU":
        raise UsageError(f"A vocabulary takes texts or integers, got {column.dtype}.")
    return column


def read_parquet(path: str | Path, columns: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return columns of a Parquet file, or of all files of a folder, by name.

    Lists of one length become (n, length) arrays, shorter ones are filled up with -1, as ``fastmtl.model.Bag`` takes
    them. Missing numbers are NaN.

    Args:
        path: A file, or a folder of files with the same columns.
        columns: The names of those to read; all if None.

    Raises:
        UsageError: There is no such file or column, it cannot be read, or pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    if not Path(path).expanduser().exists():
        raise UsageError(f"There is no Parquet file {str(path)!r}.")
    try:
        data = parquet.ParquetDataset(Path(path).expanduser(), memory_map=True)
        names = _known(path, data.schema.names, columns)
        table = data.read(columns=names)
    except (arrow.ArrowInvalid, OSError) as error:
        raise UsageError(f"{str(path)!r} cannot be read as Parquet: {str(error).splitlines()[0]}.") from error
    return {name: _column(table.column(name), arrow) for name in names}


def parquet_files(
    path: str | Path | Sequence[Path], columns: Sequence[str] | None = None
) -> tuple[list[Path], list[str], list[tuple[int, int, int]]]:
    """Return the Parquet files at a path, or those given, the columns to read, and the place of each group of rows.

    Places are the number of the file, that of the group in it, and its rows; groups without rows have none.

    Raises:
        UsageError: There is no such file or column, it cannot be read, or pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    if isinstance(path, str | Path):
        whole = Path(path).expanduser()
        files = sorted(whole.glob("*.parquet")) if whole.is_dir() else [whole]
    else:
        files = list(path)
    if not files or not files[0].exists():
        raise UsageError(f"There is no Parquet file {str(path)!r}.")
    names: list[str] = []
    places = []
    for number, file in enumerate(files):
        try:
            about = parquet.read_metadata(file)
        except (arrow.ArrowInvalid, OSError) as error:
            raise UsageError(f"{str(file)!r} cannot be read as Parquet: {str(error).splitlines()[0]}.") from error
        names = _known(file, about.schema.to_arrow_schema().names, names or columns)
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        places += [(number, group, size) for group, size in enumerate(sizes) if size]
    return files, names, places


def as_arrays(file: Path, group: int, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Return columns of one group of rows of a Parquet file, as `read_parquet` does those of all."""
    arrow, _ = _arrow()
    table = group_of_rows(file, group, columns)
    return {name: _column(table.column(name), arrow) for name in columns}


def group_of_rows(file: Path, group: int, columns: Sequence[str]) -> Any:
    """Return columns of one group of rows of a Parquet file, as a table of pyarrow."""
    _, parquet = _arrow()
    with parquet.ParquetFile(file) as opened:
        return opened.read_row_group(group, columns=list(columns))


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"Parquet files need pyarrow ({error}): pip install pyarrow.") from error
    return pyarrow, parquet


def _known(path: str | Path, known: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """Return the columns to read, all of a file if None; refuse those that it does not have."""
    names = list(known if columns is None else columns)
    missing = [name for name in names if name not in known]
    if missing:
        raise UsageError(f"{str(path)!r} has no column {missing[0]}: there are {', '.join(known)}.")
    return names


def _column(column: Any, arrow: Any) -> np.ndarray:
    chunk = column.combine_chunks()
    if (
        arrow.types.is_list(chunk.type)
        or arrow.types.is_large_list(chunk.type)
        or arrow.types.is_fixed_size_list(chunk.type)
    ):
        lengths = np.asarray(chunk.value_lengths().fill_null(0))
        values = np.asarray(chunk.flatten())
        filled = np.full((len(lengths), int(lengths.max(initial=0))), -1, dtype=values.dtype)
        filled[np.arange(filled.shape[1]) < lengths[:, None]] = values
        return filled
    return np.asarray(chunk.to_numpy(zero_copy_only=False))
