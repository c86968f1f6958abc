"""The data sets by name, and what is said of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from fastmtl.data.collate import Collate
from fastmtl.data.negatives import Negatives, NegativeSampler, labels_of
from fastmtl.data.tasks import Task, TaskInfo
from fastmtl.data.tensors import as_is, row_loader
from fastmtl.errors import UsageError
from fastmtl.model.info import EncoderInfo
from fastmtl.support.named import Found, Kind, own_place, place_of, short_name

__all__ = [
    "DATASETS",
    "DataBundle",
    "DatasetInfo",
    "Facts",
    "Loader",
    "LoaderOptions",
    "Loaders",
    "Splits",
    "Task",
    "describe_all",
    "find_dataset",
    "register",
]

Row = TypeVar("Row")

Loader = DataLoader[Any]
Loaders = Loader | dict[str, Loader]
# What a model needs to know of the data that it was trained on, as JSON has it.
Facts = dict[str, Any]


@dataclass(kw_only=True, slots=True, frozen=True)
class LoaderOptions:
    """The arguments of `load`, with the data set's defaults in place of None.

    Attributes:
        encoder: What is known of the encoder: how it wants images or texts.
        inputs: Columns that are the inputs, for data with columns.
        tasks: What is said of each task, for data with columns.
        negatives: How many negatives of a task an epoch has; None for all rows.
        stream: Whether rows are read when they are needed, where a data set can; None for large files.
        place: File and line of the data set's function, where it is the user's, for messages.
    """

    batch_size: int
    test_batch_size: int
    seed: int
    path: Path | None = None
    n_train: int | None = None
    num_workers: int = 0
    pin_memory: bool = False
    augment: bool = False
    encoder: EncoderInfo | None = None
    inputs: tuple[str, ...] = ()
    tasks: Mapping[str, Any] = field(default_factory=dict)
    negatives: Negatives | None = None
    stream: bool | None = None
    place: str = ""

    def __post_init__(self) -> None:
        for name in ("batch_size", "test_batch_size", "n_train"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}.")
        if self.num_workers < 0:
            raise UsageError(f"num_workers must be at least 0, got {self.num_workers}.")
        if self.n_train is not None and self.n_train < self.batch_size:
            raise UsageError(
                f"n_train must be at least batch_size ({self.batch_size}) to give a whole batch, got {self.n_train}."
            )

    def loader(
        self,
        dataset: Dataset[Row],
        split: str,
        *,
        number: int = 0,
        in_batches: bool = False,
        sampler: Sampler[int] | None = None,
    ) -> DataLoader[Row]:
        """Return the loader of ``"train"``, shuffled, or of ``"val"`` or ``"test"``, in order.

        Loaders with another ``number`` shuffle differently; with ``in_batches`` the data set returns whole batches.
        Texts are tokenized as the encoder wants them, graphs of torch_geometric joined to one. The training loader
        draws the ``negatives``, or what a ``sampler`` does.

        Raises:
            UsageError: A sampler for another split, or where ``negatives`` are to be drawn; fewer rows than a batch.
        """
        train = split == "train"
        if sampler is not None and not train:
            raise UsageError(f"{self.place}A sampler draws the rows of train, those of {split} come in order.")
        if sampler is not None and self.negatives is not None:
            raise UsageError(f"{self.place}negatives must be off where the rows of train are drawn by a sampler.")
        return row_loader(
            dataset,
            self.batch_size if train else self.test_batch_size,
            shuffle=train,
            seed=self.seed + number,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=as_is if in_batches else Collate.of(self.encoder, dataset, self.place),
            sampler=self._sampler(dataset, self.seed + number) if train and sampler is None else sampler,
        )

    def _sampler(self, dataset: Dataset[Row], seed: int) -> NegativeSampler | None:
        """Return what draws negatives, if that is asked for."""
        if self.negatives is None:
            return None
        labels = labels_of(dataset, self.negatives.task)
        return NegativeSampler(labels, self.negatives.ratio, torch.Generator().manual_seed(seed))

    def splits(self, train: Dataset[Any], test: Dataset[Any], val: Dataset[Any] | None = None, **facts: Any) -> Splits:
        """Return the loaders of data sets of rows (inputs, labels by task).

        Args:
            train: A data set with ``len``; the first ``n_train`` rows of it are used, if that is given.
            test: The same, of test data.
            val: The same, of validation data, which chooses the best epoch; None for none.
            **facts: What a model has to know of the data, see `Splits`, such as ``image_size=(64, 64)``.

        Raises:
            UsageError: Fewer rows than a batch or than ``n_train``.
        """
        from torch.utils.data import Subset

        rows = {"train": train, "val": val, "test": test}
        counts = {split: len(data) for split, data in rows.items() if data is not None}  # type: ignore[arg-type]
        if self.n_train is not None:
            if self.n_train > counts["train"]:
                raise UsageError(
                    f"train_size must be at most the {counts['train']} rows there are, got {self.n_train}."
                )
            rows["train"], counts["train"] = Subset(train, range(self.n_train)), self.n_train
        loaders = {split: None if data is None else self.loader(data, split) for split, data in rows.items()}
        assert loaders["train"] is not None
        assert loaders["test"] is not None
        image_size = facts.pop("image_size", None)
        return Splits(
            train=loaders["train"],
            val=loaders["val"],
            test=loaders["test"],
            rows=counts,
            image_size=image_size,
            facts=facts,
        )


@dataclass(kw_only=True, slots=True)
class Splits:
    """The loaders of a data set, one per split, or per split and task.

    ``rows`` are the numbers of rows of the splits, with multi-input data those of the largest task; ``image_size`` is
    (height, width) where the decoders need it; ``build_encoder`` makes an encoder that depends on the data. ``facts``
    are what a model has to know of the data it was trained on
    when the data are no longer there, such as means or a vocabulary: a run keeps them, and ``read_row`` gets them.
    """

    train: Loaders
    val: Loaders | None
    test: Loaders
    rows: dict[str, int]
    image_size: tuple[int, int] | None = None
    build_encoder: Callable[[], nn.Module] | None = None
    facts: Facts = field(default_factory=dict)


@dataclass(kw_only=True, slots=True, frozen=True)
class DatasetInfo:
    """The description of a data set, and the functions that load it.

    The tasks are given as ``tasks``, or as ``outputs``, ``make_task`` and ``make_head``.

    Attributes:
        load_splits: Creates the loaders.
        tasks: Task name to its `TaskInfo`; or a function that makes them of the facts of `Splits`.
        name: Its name; of a data set that is named by module or file, that of the module if not given.
        description, source, licence: One line each.
        multi_input: Each task has inputs of its own.
        outputs: Task name to the number of outputs of its decoder.
        labels: Task name to the names of its classes, where ``outputs`` are given.
        rows: Split to its number of rows by default.
        encoders: Names in ``ENCODERS`` that fit, all if empty; the first is the default.
        make_task: Creates the entry of one task in ``task_dict``, with new metrics and losses.
        make_head: Creates a decoder from the encoder's channels and the number of outputs, and from ``size`` if the
            splits have an ``image_size``.
        read_row: Makes the inputs of one example from a row of columns by name and the facts of `Splits`, as for
            `fastmtl predict`; an image file is the column ``image``, a PIL image. Facts include ``image_size``, and
            ``folder``, where relative paths in the row begin.
        needs_path: The data must be given as a folder.
        has_columns: Its tasks are told by the user, as columns.
        streams: It can read rows when they are needed, as ``stream`` of `LoaderOptions` says.
        batch_size, test_batch_size: Default rows of a batch of training, and of validation and test.
        in_memory: The data are in memory, so that worker processes would only slow loading down.
    """

    load_splits: Callable[[LoaderOptions], Splits]
    tasks: Mapping[str, TaskInfo] | Callable[[Facts], Mapping[str, TaskInfo]] | None = None
    name: str = ""
    description: str = ""
    source: str = ""
    licence: str = ""
    multi_input: bool = False
    outputs: dict[str, int] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    encoders: tuple[str, ...] = ()
    make_task: Callable[[str], Task] | None = None
    make_head: Callable[..., nn.Module] | None = None
    read_row: Callable[[Mapping[str, Any], Facts], Any] | None = None
    needs_path: bool = False
    has_columns: bool = False
    streams: bool = False
    batch_size: int = 64
    test_batch_size: int = 256
    in_memory: bool = False

    def tasks_of(self, facts: Facts) -> dict[str, TaskInfo]:
        """Return the tasks, given what is known of the data.

        Raises:
            UsageError: There are none, or they are not made as tasks are.
        """
        if self.tasks is not None:
            made = dict(self.tasks(facts) if callable(self.tasks) else self.tasks)
            place = own_place(self.load_splits)
            if not made:
                raise UsageError(
                    f"{place}The data set {self.name} has no tasks: give it tasks={{name: classes(10), ...}}."
                )
            for task, about in made.items():
                if not isinstance(about, TaskInfo):
                    raise UsageError(
                        f"{place}The task {task} of the data set {self.name} must be made by classes, binary, "
                        "regression, segmentation, depth or normals of fastmtl.data, it is a "
                        f"{type(about).__name__}."
                    )
            return made
        if not self.outputs or self.make_task is None or self.make_head is None:
            raise UsageError(f"The data set {self.name} has no tasks: give it tasks={{name: classes(10), ...}}.")
        return {task: self._task(task, units) for task, units in self.outputs.items()}

    def _task(self, task: str, units: int) -> TaskInfo:
        assert self.make_task is not None
        assert self.make_head is not None
        made = self.make_task(task)
        return TaskInfo(
            outputs=units,
            make_loss=lambda: made["loss_fn"],
            make_metric=lambda: made["metrics_fn"],
            metrics=tuple(made["metrics"]),
            weight=tuple(made["weight"]),
            make_head=self.make_head,
            labels=self.labels.get(task, ()),
            # Such decoders take the image's size wherever the splits have one.
            maps=True,
        )


@dataclass(kw_only=True, slots=True)
class DataBundle:
    """A loaded data set, in the form ``Trainer`` takes.

    Attributes:
        name, description, source, licence, batch_size, test_batch_size: As of `DatasetInfo`.
        multi_input: Each task has its own inputs; the loaders are then dictionaries by task.
        task_dict: LibMTL's ``task_dict``: per task ``metrics``, ``metrics_fn``, ``loss_fn``, ``weight``.
        train: Batches of ``(inputs, {task: labels})``, or of ``(inputs, labels)`` per task if ``multi_input``.
        val, test: The same, in order; ``val`` is None if the data set has no such split.
        rows: Split to its number of rows (per task, if ``multi_input``).
        encoder: Name of the encoder.
        encoder_class: Creates a new encoder at each call.
        feature_dim: Channels of the encoder's output.
        outputs: Task name to the number of outputs of its decoder.
        make_heads: Task name to the function that creates its decoder from ``feature_dim`` and the number of outputs.
        facts: What a model has to know of the data, see `Splits`; ``image_size`` among it.
        labels: Task name to the names of its classes, where they have any.
        kinds: Task name to what it is by the data set's own loss: ``"classes"``, ``"regression"``, ... or ``"other"``.
        builds_encoder: Whether the data set makes the encoder of its data, see `Splits`.
    """

    name: str
    description: str
    source: str
    licence: str
    multi_input: bool
    task_dict: dict[str, dict[str, Any]]
    train: Loaders
    val: Loaders | None
    test: Loaders
    rows: dict[str, int]
    batch_size: int
    test_batch_size: int
    encoder: str
    encoder_class: Callable[[], nn.Module]
    feature_dim: int
    outputs: dict[str, int]
    make_heads: Mapping[str, Callable[[int, int], nn.Module]] = field(repr=False)
    facts: Facts = field(default_factory=dict, repr=False)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    kinds: dict[str, str] = field(default_factory=dict, repr=False)
    builds_encoder: bool = field(default=False, repr=False)

    def decoders(self) -> nn.ModuleDict:
        """Return new decoders, one per task, for the encoder's output."""
        return nn.ModuleDict(
            {task: self.make_heads[task](self.feature_dim, units) for task, units in self.outputs.items()}
        )


DATASETS: dict[str, DatasetInfo] = {}


def register(infos: Iterable[DatasetInfo]) -> None:
    """Add data sets to ``DATASETS``."""
    DATASETS.update({info.name: info for info in infos})


def find_dataset(name: str) -> Found[DatasetInfo]:
    """Return the data set of a name.

    It is one of ``DATASETS``, of an entry point of the group ``fastmtl.datasets``, or ``module:name`` or
    ``file.py:name`` of a `DatasetInfo` or of a function without arguments that returns one.

    Raises:
        UsageError: There is no such name, or it is no data set.
    """
    found = Kind("data set", "fastmtl.datasets").find(name, DATASETS)
    info = found.value
    if not isinstance(info, DatasetInfo):
        made, what = info, "is a class" if isinstance(info, type) else f"is a {type(info).__name__}"
        if callable(info) and not isinstance(info, type):
            if _needs_arguments(info):
                what = "takes arguments"
            else:
                made = info()
                what = f"returns {'nothing' if made is None else f'a {type(made).__name__}'}"
        if not isinstance(made, DatasetInfo):
            raise UsageError(
                f"{place_of(info, found.name)}: the data set {short_name(found.name)} must be a DatasetInfo of "
                f"fastmtl.data or a function without arguments that returns one, it {what}."
            )
        info = made
    place = found.name.rpartition(":")[0]
    stem = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    return Found(found.name, info if info.name else replace(info, name=stem or found.name))


def _needs_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:
        # A function of C has no signature that can be read.
        return False
    return False


def describe_all() -> list[dict[str, str]]:
    """Return one row per data set for a table: name, description, tasks, rows, source and licence."""
    return [
        {
            "name": info.name,
            "description": info.description,
            "tasks": ", ".join(f"{task} ({units})" for task, units in _outputs_of(info).items()) or _untold(info),
            "inputs": "one per task" if info.multi_input else "shared",
            "rows": ", ".join(f"{count:,} {split}" for split, count in info.rows.items()) or "as of the folder",
            "encoders": ", ".join(info.encoders) or "any that fits",
            "source": info.source,
            "licence": info.licence,
        }
        for info in DATASETS.values()
    ]


def _outputs_of(info: DatasetInfo) -> dict[str, int]:
    """Return the outputs of the tasks as far as they are known without the data."""
    if isinstance(info.tasks, Mapping):
        return {task: about.outputs for task, about in info.tasks.items()}
    return info.outputs


def _untold(info: DatasetInfo) -> str:
    return "columns, as you say" if info.has_columns else "as of the data"
