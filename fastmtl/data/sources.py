"""Rows of columns from a folder: parquet files, data sets of Hugging Face's ``datasets``, WebDataset's shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastmtl.errors import UsageError
from fastmtl.support.extras import need

__all__ = ["SOURCES", "Rows", "Table", "read_table", "split_files", "split_rows", "values_of"]

# How the splits may be called in files and folders.
_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
_TEST_SHARE = 0.1
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


class Table(Protocol):
    """Columns that are read some rows at a time."""

    def __len__(self) -> int: ...

    def names(self) -> list[str]:
        """Return the names of the columns."""

    def first(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the values of columns in the first row."""

    def chunks(self, names: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        """Yield the values of columns, part by part where the rows are not in memory."""


class Rows(Table, Protocol):
    """Rows that are read one by one."""

    def row(self, index: int) -> dict[str, Any]:
        """Return a row: its values by column."""

    def column(self, name: str) -> Sequence[Any]:
        """Return the values of a column in all rows."""

    def first(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the values of columns in the first row."""
        row = self.row(0)
        return {name: row[name] for name in names}

    def chunks(self, names: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        """Yield the values of columns in all rows at once."""
        yield {name: self.column(name) for name in names}


class _Part(Rows):
    """Some of the rows."""

    def __init__(self, rows: Rows, indices: Sequence[int]) -> None:
        self.rows, self.indices = rows, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, index: int) -> dict[str, Any]:
        return self.rows.row(self.indices[index])

    def column(self, name: str) -> Sequence[Any]:
        whole = self.rows.column(name)
        return [whole[index] for index in self.indices]

    def names(self) -> list[str]:
        return self.rows.names()


class _Parquet(Rows):
    def __init__(self, files: Sequence[Path]) -> None:
        parquet = need("pyarrow.parquet", "data", "The data set parquet")
        arrow = need("pyarrow", "data", "The data set parquet")
        try:
            self.table = arrow.concat_tables([parquet.read_table(file, memory_map=True) for file in files])
        except (OSError, ValueError) as error:
            raise UsageError(f"{files[0].parent} has parquet files that cannot be read together: {error}.") from error

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.table.slice(index, 1).to_pylist()[0]
        return row

    def column(self, name: str) -> Sequence[Any]:
        return values_of(self.table.column(name))

    def names(self) -> list[str]:
        return list(self.table.column_names)


def values_of(column: Any) -> Sequence[Any]:
    """Return the values of a column of pyarrow: an array of numbers where all are there, else a list."""
    kind = str(column.type)
    if column.null_count == 0 and kind in ("float", "double", "int64", "int32", "int16", "int8", "bool", "uint8"):
        values: Sequence[Any] = column.to_numpy()
        return values
    rows: list[Any] = column.to_pylist()
    return rows


class _HF(Rows):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def row(self, index: int) -> dict[str, Any]:
        return dict(self._named(self.data[index]))

    def column(self, name: str) -> Sequence[Any]:
        return [self._named({name: value})[name] for value in self.data[name]]

    def names(self) -> list[str]:
        return list(self.data.column_names)

    def _named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with the names of its classes in place of their numbers."""
        features = self.data.features
        named = {}
        for name, value in row.items():
            of_class = getattr(features[name], "names", None)
            named[name] = of_class[value] if of_class and isinstance(value, int) and value >= 0 else value
        return named


class _Shards(Rows):
    """Samples of WebDataset: the files of a tar archive that have one name, by their extensions."""

    def __init__(self, files: Sequence[Path]) -> None:
        # File, place and size of each member, by extension.
        self.samples: list[dict[str, tuple[Path, int, int]]] = []
        for file in files:
            by_name: dict[str, dict[str, tuple[Path, int, int]]] = {}
            try:
                with tarfile.open(file, "r:") as archive:
                    for member in archive:
                        if member.isfile():
                            folder, _, base = member.name.rpartition("/")
                            stem, _, extension = base.partition(".")
                            place = (file, member.offset_data, member.size)
                            by_name.setdefault(f"{folder}/{stem}", {})[extension.lower()] = place
            except (OSError, tarfile.TarError) as error:
                raise UsageError(f"{file} is no uncompressed tar archive that can be read: {error}.") from error
            self.samples += by_name.values()

    def __len__(self) -> int:
        return len(self.samples)

    def row(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for extension, (file, start, size) in self.samples[index].items():
            value = _decoded(extension, _read(file, start, size), file)
            # The columns of a JSON object are columns of the sample.
            row |= value if extension == "json" and isinstance(value, dict) else {extension: value}
        return row

    def column(self, name: str) -> Sequence[Any]:
        extensions = {name, "json"}
        return [
            _only(sample, extensions, name) if name in sample or "json" in sample else None for sample in self.samples
        ]

    def names(self) -> list[str]:
        return list(self.row(0)) if self.samples else []


def _only(sample: Mapping[str, tuple[Path, int, int]], extensions: set[str], name: str) -> Any:
    row: dict[str, Any] = {}
    for extension in extensions & sample.keys():
        file, start, size = sample[extension]
        value = _decoded(extension, _read(file, start, size), file)
        row |= value if extension == "json" and isinstance(value, dict) else {extension: value}
    return row.get(name)


def _read(file: Path, start: int, size: int) -> bytes:
    with file.open("rb") as archive:
        archive.seek(start)
        return archive.read(size)


def _decoded(extension: str, content: bytes, file: Path) -> Any:
    kind = extension.rpartition(".")[2]
    try:
        if kind == "json":
            return json.loads(content)
        if kind in ("cls", "id", "index"):
            return int(content)
        if kind in ("txt", "text", "transcript"):
            return content.decode("utf-8")
        if kind == "npy":
            return np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise UsageError(f"{file} has a .{extension} that cannot be read: {error}.") from error
    return content


def _parquet_folder(folder: Path) -> dict[str, Rows]:
    return {split: _Parquet(files) for split, files in split_files(folder, ".parquet").items()}


def _shards_folder(folder: Path) -> dict[str, Rows]:
    return {split: _Shards(files) for split, files in split_files(folder, ".tar").items()}


def _hf_folder(folder: Path) -> dict[str, Rows]:
    datasets = need("datasets", "data", "The data set datasets")
    try:
        saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    except Exception as error:
        # Every builder of datasets raises what it likes.
        raise UsageError(f"{folder} cannot be read by datasets: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(loaded, Mapping):
        return {"train": _HF(loaded)}
    by_name = {alias: split for split, names in _NAMES.items() for alias in names}
    unknown = [name for name in loaded if name not in by_name]
    if unknown:
        raise UsageError(f"{folder} has splits {', '.join(loaded)}: only train, validation and test are known.")
    return {by_name[name]: _HF(data) for name, data in loaded.items()}


def split_files(folder: Path, suffix: str) -> dict[str, list[Path]]:
    """Return the files of each split: ``train.parquet``, ``train-000.parquet``, ``train/*.parquet``."""
    found: dict[str, list[Path]] = {}
    for split, names in _NAMES.items():
        for name in names:
            files = [folder / f"{name}{suffix}", *sorted(folder.glob(f"{name}[-_.0-9]*{suffix}"))]
            files += sorted((folder / name).glob(f"*{suffix}"))
            there = list(dict.fromkeys(file for file in files if file.is_file()))
            if there:
                found[split] = there
                break
    if not found:
        files = sorted(folder.glob(f"*{suffix}"))
        if not files:
            raise UsageError(f"{folder} has no {suffix} files: train{suffix} and test{suffix}, or train/ and test/.")
        found = {"train": files}
        print(f"{folder}: no file is named after a split, so that all {len(files)} are training data")
    unread = sorted(set(folder.glob(f"*{suffix}")).difference(*found.values()))
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        first = ", ".join(file.name for file in unread[:3])
        print(f"{folder}: not read, as not named after a split: {first}{more}")
    if "train" not in found:
        raise UsageError(f"{folder} has no {suffix} files to train on, only {', '.join(found)}.")
    return found


# What reads a folder, by the name of the data set.
SOURCES: dict[str, Callable[[Path], dict[str, Rows]]] = {
    "parquet": _parquet_folder,
    "datasets": _hf_folder,
    "webdataset": _shards_folder,
}


def split_rows(name: str, folder: Path) -> dict[str, Rows]:
    """Return the rows of the splits ``train``, ``test`` and, where there is one, ``val``.

    Without a test split, a tenth of the training rows, drawn with seed 0, become one, which is printed.

    Raises:
        UsageError: The folder cannot be read, or has no rows to train on.
    """
    parts = SOURCES[name](folder)
    if not len(parts["train"]):
        raise UsageError(f"{folder} has no rows to train on.")
    if "test" not in parts:
        order = np.random.default_rng(0).permutation(len(parts["train"]))
        count = max(1, round(_TEST_SHARE * len(order)))
        print(f"{name}: {folder} has no test split, so {count} of its {len(order)} rows, drawn with seed 0, are one")
        whole = parts["train"]
        parts |= {"train": _Part(whole, sorted(order[count:])), "test": _Part(whole, sorted(order[:count]))}
    return parts


def read_table(path: Path) -> Rows:
    """Return the rows of one file: parquet, or JSON lines.

    Raises:
        UsageError: It cannot be read.
    """
    if path.suffix == ".parquet":
        return _Parquet([path])
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}:{number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise UsageError(f"{path}:{number} must be an object, {{column: value}}, got a {type(row).__name__}.")
            rows.append(row)
    return _Listed(rows)


class _Listed(Rows):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def column(self, name: str) -> Sequence[Any]:
        return [row.get(name) for row in self.rows]

    def names(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []
