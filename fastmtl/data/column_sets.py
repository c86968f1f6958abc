"""Data sets of columns: which are inputs, which are labels, and how their values become tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmtl.data.column_numbers import known_numbers, moments, no_value, number_table, numbers_of
from fastmtl.data.images import as_image, is_image, to_map, to_tensor
from fastmtl.data.registry import DatasetInfo, Facts, LoaderOptions, Splits, register
from fastmtl.data.sources import Rows, Table, split_files, split_rows
from fastmtl.data.streamed import STREAMED_BYTES, ParquetGroups, StreamedColumns, groups_held, sampler_of
from fastmtl.data.tasks import KINDS, TaskInfo, binary, classes, depth, normals, regression, segmentation
from fastmtl.data.tensors import Tensors
from fastmtl.errors import UsageError
from fastmtl.model.info import ImageInput
from fastmtl.support.names import resolve_name

__all__ = ["read_row", "tasks_of"]

_LARGEST = 256
# Marks a missing class, as torch does; in maps -1.
_MISSING = -100


def tasks_of(facts: Facts) -> dict[str, TaskInfo]:
    """Return the tasks that facts of columns describe."""
    return {task: _task(about) for task, about in facts["tasks"].items()}


def _task(about: Mapping[str, Any]) -> TaskInfo:
    kind = about["kind"]
    if kind == "classes":
        return classes(about["labels"])
    if kind == "segmentation":
        return segmentation(about.get("labels") or about["outputs"])
    if kind == "regression":
        return regression(about["outputs"])
    return {"binary": binary, "depth": depth, "normals": normals}[kind]()


def read_row(row: Mapping[str, Any], facts: Facts) -> Any:
    """Return the inputs of a row: an image (3, h, w), a text, or a vector.

    Relative paths begin in the folder of the facts that is called ``folder``, which is no fact of the training data.

    Raises:
        UsageError: A column or its value is missing, or is of another kind than in training.
    """
    missing = [name for name in facts["inputs"] if name not in row]
    if missing and facts["kind"] == "image" and "image" in row:
        # A file of predict.
        row, missing = {**row, facts["inputs"][0]: row["image"]}, []
    if missing:
        raise UsageError(f"A row has no column {missing[0]!r}, which is an input, only {', '.join(row) or 'none'}.")
    folder = Path(facts["folder"]) if facts.get("folder") else None
    if facts["kind"] == "image":
        value = row[facts["inputs"][0]]
        return to_tensor(as_image(value, folder), facts["image_size"], facts["image_mean"], facts["image_std"])
    if facts["kind"] == "text":
        (column,) = facts["inputs"]
        if row[column] is None:
            raise no_value(column, None)
        return str(row[column])
    values = torch.from_numpy(np.concatenate([known_numbers(name, row[name]) for name in facts["inputs"]]))
    if len(values) != len(facts["mean"]):
        raise UsageError(f"A row has {len(values)} numbers as inputs in place of the {len(facts['mean'])} of training.")
    return (values - torch.tensor(facts["mean"])) / torch.tensor(facts["std"])


def _plain(value: Any) -> Any:
    """Return a value as Python has it: numpy's float32 of 0.1 has another name."""
    return value.item() if isinstance(value, np.generic) else value


class _Labels:
    """Makes the labels of a row."""

    def __init__(self, tasks: Mapping[str, Mapping[str, Any]], size: Sequence[int] | None, folder: Path) -> None:
        self.tasks, self.size, self.folder = tasks, size, folder
        self.numbers = {
            task: {label: number for number, label in enumerate(about["labels"])}
            for task, about in tasks.items()
            if about["kind"] == "classes"
        }

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        return {task: self._label(task, row[about["column"]], about["kind"]) for task, about in self.tasks.items()}

    def column(self, task: str, values: Sequence[Any] | np.ndarray) -> Tensor:
        """Return the labels (n, ...) of a task in n rows."""
        about = self.tasks[task]
        if (
            isinstance(values, np.ndarray)
            and about["kind"] in ("regression", "binary")
            and about.get("outputs", 1) == 1
        ):
            return torch.from_numpy(values.astype(np.float32))[:, None]
        return torch.stack([self._label(task, value, about["kind"]) for value in values])

    def _label(self, task: str, value: Any, kind: str) -> Tensor:
        value = _plain(value)
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        if kind == "classes":
            if missing:
                return torch.tensor(_MISSING)
            if str(value) not in self.numbers[task]:
                raise UsageError(
                    f"The column {self.tasks[task]['column']!r} has {value!r}, which is none of the classes of the "
                    f"training rows: {', '.join(list(self.numbers[task])[:10])}."
                )
            return torch.tensor(self.numbers[task][str(value)])
        if kind in ("regression", "binary"):
            outputs, column = self.tasks[task].get("outputs", 1), self.tasks[task]["column"]
            label = torch.from_numpy(numbers_of(column, [math.nan] * outputs if missing else value))
            if len(label) != outputs:
                raise UsageError(f"The column {column!r} has {len(label)} numbers, not {outputs}.")
            return label
        assert self.size is not None
        if missing:
            # Pixels without a label: a class of -1, depths and normals of 0.
            shape = {"segmentation": (), "depth": (1,), "normals": (3,)}[kind]
            return torch.full((*shape, *self.size), -1.0 if kind == "segmentation" else 0.0)
        label = to_map(value, self.size, {"segmentation": 0, "depth": 1, "normals": 3}[kind], self.folder)
        # The usual mark of unlabelled pixels in images of bytes.
        return torch.where(label == 255, -1.0, label) if kind == "segmentation" else label


class _Columns(Dataset[tuple[Any, dict[str, Tensor]]]):
    def __init__(self, rows: Rows, facts: Facts, labels: _Labels, augment: bool) -> None:
        self.rows, self.facts, self.labels, self.augment = rows, facts, labels, augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Tensor]]:
        row = self.rows.row(index)
        inputs = read_row(row, self.facts)
        if self.augment and torch.rand(()) < 0.5:
            inputs = inputs.flip(-1)
        return inputs, self.labels(row)


def load_columns(name: str, options: LoaderOptions) -> Splits:
    """Return the loaders of a folder of columns.

    Raises:
        UsageError: A column is missing, or has values that cannot be what they are said to be.
    """
    assert options.path is not None
    if not options.inputs or not options.tasks:
        raise UsageError(
            f"The data set {name} needs the columns that are inputs and the tasks: --inputs image --tasks "
            "price=regression,colour=classes."
        )
    streamed = _streamed(name, options)
    parts = split_rows(name, options.path) if streamed is None else {}
    facts = _facts((parts if streamed is None else streamed)["train"], options)
    size = facts.pop("image_size", None)
    labels = _Labels(facts["tasks"], size, options.path)
    if options.augment and (facts["kind"] != "image" or any(about.maps for about in tasks_of(facts).values())):
        raise UsageError(f"aug must be off for {name} with inputs of {facts['kind']} or with maps: it mirrors images.")
    whole = {**facts, "folder": str(options.path)} | ({} if size is None else {"image_size": size})
    if streamed is not None:
        return _by_groups(name, streamed, facts, labels, options)
    if facts["kind"] == "vector":
        return _in_memory(parts, facts, labels, options)
    sets = {split: _Columns(rows, whole, labels, options.augment and split == "train") for split, rows in parts.items()}
    return options.splits(sets["train"], sets["test"], sets.get("val"), image_size=size, **facts)


def _in_memory(parts: Mapping[str, Rows], facts: Facts, labels: _Labels, options: LoaderOptions) -> Splits:
    loaders, counts = {}, {}
    for split, rows in parts.items():
        names = {*facts["inputs"], *(about["column"] for about in facts["tasks"].values())}
        columns = {name: rows.column(name) for name in names}
        count = len(rows)
        if split == "train" and options.n_train is not None:
            if options.n_train > count:
                raise UsageError(f"train_size must be at most the {count} rows there are, got {options.n_train}.")
            count = options.n_train
        made = _tensors({name: values[:count] for name, values in columns.items()}, facts, labels)
        loaders[split] = options.loader(Tensors(*made), split, in_batches=True)
        counts[split] = count
    return Splits(train=loaders["train"], val=loaders.get("val"), test=loaders["test"], rows=counts, facts=facts)


def _streamed(name: str, options: LoaderOptions) -> dict[str, ParquetGroups] | None:
    """Return the rows of a folder by groups, if they are to be read so; a line says why large ones are not.

    Raises:
        UsageError: The user wants that, and it cannot be.
    """
    assert options.path is not None
    if name != "parquet" or options.stream is False:
        return None
    files = split_files(options.path, ".parquet")
    size = sum(file.stat().st_size for of_split in files.values() for file in of_split)
    if options.stream is None and size <= STREAMED_BYTES:
        return None
    parts = {split: ParquetGroups(of_split) for split, of_split in files.items()}
    cause = _whole_cause(parts, options)
    if cause is not None and options.stream:
        raise UsageError(f"stream must be off for {options.path}: {cause}.")
    if cause is not None:
        print(f"{name}: the {size / 2**30:.1f} GiB of {options.path} are read into memory: {cause}")
        return None
    return parts


def _whole_cause(parts: Mapping[str, ParquetGroups], options: LoaderOptions) -> str | None:
    """Return why rows cannot be read by groups."""
    if "test" not in parts:
        return "it has no test split, and one that is drawn has rows of all groups"
    if options.negatives is not None:
        return "negatives are drawn from all rows"
    empty = [split for split, rows in parts.items() if not len(rows)]
    if empty:
        return f"it has no rows of {empty[0]}"
    there = parts["train"].names()
    first = parts["train"].first([name for name in options.inputs if name in there])
    if any(_input_kind(value, options.path) != "vector" for value in first.values()):
        return "inputs are images or texts, and only numbers are read by groups"
    return None


def _by_groups(
    name: str, parts: Mapping[str, ParquetGroups], facts: Facts, labels: _Labels, options: LoaderOptions
) -> Splits:
    """Return the loaders of rows that are read by groups; a line says how many are held."""
    names = list(dict.fromkeys([*facts["inputs"], *(about["column"] for about in facts["tasks"].values())]))
    make = partial(_tensors, facts=facts, labels=labels)
    counts = {split: len(rows) for split, rows in parts.items()}
    if options.n_train is not None:
        if options.n_train > counts["train"]:
            raise UsageError(f"train_size must be at most the {counts['train']} rows there are, got {options.n_train}.")
        counts["train"] = options.n_train
    train, loaders = parts["train"], {}
    held = groups_held(train, names, make)
    print(
        f"{name}: {options.path} is read as it is needed (--stream), {len(train.sizes)} groups of up to "
        f"{max(train.sizes):,} training rows, of which the rows of {held} at a time are mixed"
    )
    for split, rows in parts.items():
        sampler = sampler_of(rows, counts[split], held, options.seed) if split == "train" else None
        data = StreamedColumns(rows, names, make, held if split == "train" else 1)
        loaders[split] = options.loader(data, split, in_batches=True, sampler=sampler)
    return Splits(train=loaders["train"], val=loaders.get("val"), test=loaders["test"], rows=counts, facts=facts)


def _tensors(columns: Mapping[str, Sequence[Any]], facts: Facts, labels: _Labels) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the inputs (n, width) and the labels (n, ...) by task of n rows."""
    table = number_table([columns[name] for name in facts["inputs"]], facts["inputs"])
    if table.shape[1] != len(facts["mean"]):
        raise UsageError(
            f"A row has {table.shape[1]} numbers as inputs in place of the {len(facts['mean'])} of training."
        )
    inputs = (table - torch.tensor(facts["mean"])) / torch.tensor(facts["std"])
    return inputs, {task: labels.column(task, columns[about["column"]]) for task, about in facts["tasks"].items()}


def _facts(rows: Table, options: LoaderOptions) -> Facts:
    """Return what the training rows say of inputs and tasks."""
    there = rows.names()
    for name in options.inputs:
        resolve_name(name, {column: column for column in there}, "column of inputs")
    first = rows.first(options.inputs)
    values = [first[name] for name in options.inputs]
    kinds = {_input_kind(value, options.path) for value in values}
    if len(kinds) > 1 or (kinds != {"vector"} and len(values) > 1):
        got = ", ".join(sorted(kinds))
        raise UsageError(f"inputs must be one column of images, one of texts, or columns of numbers, got {got}.")
    (kind,) = kinds
    facts: Facts = {"kind": kind, "inputs": list(options.inputs)}
    if kind == "image":
        wanted = options.encoder.image if options.encoder is not None else None
        width, height = as_image(values[0], options.path).size
        own = (height, width) if max(height, width) <= _LARGEST else ImageInput().size
        usual = wanted or ImageInput(size=own)
        facts |= {"image_size": list(usual.size), "image_mean": list(usual.mean), "image_std": list(usual.std)}
    elif kind == "vector":
        mean, spread = moments(rows, options.inputs)
        facts |= {"mean": mean.tolist(), "std": torch.where(spread > 0, spread, 1).tolist(), "width": len(mean)}
    facts["tasks"] = {str(task): _described(str(task), about, rows, there) for task, about in options.tasks.items()}
    return facts


def _input_kind(value: Any, folder: Path | None) -> str:
    if is_image(value, folder):
        return "image"
    return "text" if isinstance(value, str) else "vector"


def _described(task: str, about: Any, rows: Table, there: Sequence[str]) -> dict[str, Any]:
    """Return kind, column, and outputs or labels of a task."""
    given = dict(about) if isinstance(about, Mapping) else {"kind": about}
    unknown = sorted(given.keys() - {"kind", "column", "labels", "outputs"})
    if unknown:
        raise UsageError(f"The task {task} has {unknown[0]!r}: only kind, column, labels and outputs are known.")
    kind = resolve_name(str(given.get("kind")), {name: name for name in KINDS}, f"kind of the task {task}")
    _check_settings(task, kind, given)
    column = resolve_name(str(given.get("column", task)), {name: name for name in there}, f"column of the task {task}")
    told: dict[str, Any] = {"kind": kind, "column": column}
    if kind == "classes":
        labels = given.get("labels")
        if labels is None:
            values = (_plain(value) for part in rows.chunks([column]) for value in part[column])
            found = {value for value in values if value is not None and value == value}
            numbers = all(isinstance(value, int) for value in found)
            labels = sorted(found) if numbers else sorted(map(str, found))
        if len(labels) < 2:
            raise UsageError(f"The column {column!r} of the task {task} has {len(labels)} classes: two are the least.")
        told["labels"] = [str(label) for label in labels]
    elif kind == "segmentation":
        told |= {key: given[key] for key in ("labels", "outputs") if key in given}
    elif kind == "regression":
        values = (value for part in rows.chunks([column]) for value in part[column])
        told["outputs"] = len(numbers_of(column, next((value for value in values if value is not None), None)))
    return told


# What else than the column may be said of a task.
_SETTINGS = {"classes": ("labels",), "segmentation": ("labels", "outputs")}


def _check_settings(task: str, kind: str, given: Mapping[str, Any]) -> None:
    for name in ("labels", "outputs"):
        if name in given and name not in _SETTINGS.get(kind, ()):
            others = " or ".join(other for other, names in _SETTINGS.items() if name in names)
            raise UsageError(f"The task {task} is {kind} and has {name!r}, which is for {others}: leave it out.")
    labels, outputs = given.get("labels"), given.get("outputs")
    if labels is not None and (isinstance(labels, str) or not isinstance(labels, Sequence)):
        raise UsageError(f"labels of the task {task} must be a list of names, got {labels!r}.")
    if kind != "segmentation":
        return
    if labels is None and outputs is None:
        raise UsageError(f"The task {task} needs its number of classes: {{kind: segmentation, outputs: 13}}.")
    if outputs is not None and (not isinstance(outputs, int) or outputs < 2):
        raise UsageError(f"outputs of the task {task} must be a number of classes from 2 on, got {outputs!r}.")
    if labels is not None and outputs is not None and len(labels) != outputs:
        raise UsageError(f"The task {task} has {len(labels)} labels, but outputs is {outputs}.")


def _info(name: str, description: str, streams: bool = False) -> DatasetInfo:
    return DatasetInfo(
        name=name,
        description=description,
        source="a folder of yours",
        licence="as of the folder's data",
        load_splits=partial(load_columns, name),
        tasks=tasks_of,
        read_row=read_row,
        needs_path=True,
        has_columns=True,
        streams=streams,
    )


register(
    [
        _info(
            "parquet",
            "Columns of parquet files: train.parquet, test.parquet, or folders train and test of them.",
            streams=True,
        ),
        _info("datasets", "A folder of Hugging Face's datasets: save_to_disk, or images, CSV or JSON in folders."),
        _info(
            "webdataset", "Shards of WebDataset: train-000.tar, ..., test-000.tar; columns by extension or in .json."
        ),
    ]
)
