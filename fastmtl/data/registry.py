"""The data sets by name, each with the loaders, tasks, encoder and decoders of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastmtl.data.encoders import ENCODERS
from fastmtl.data.tensors import as_is, row_loader
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss
from fastmtl.metrics import AbsMetric
from fastmtl.support.names import resolve_name

__all__ = ["DATASETS", "DataBundle", "DatasetInfo", "LoaderOptions", "Splits", "describe_all", "load", "register"]

Row = TypeVar("Row")

Loader = DataLoader[Any]
Loaders = Loader | dict[str, Loader]


class Task(TypedDict):
    """The entry of a task in LibMTL's ``task_dict``."""

    metrics: list[str]
    metrics_fn: AbsMetric
    loss_fn: AbsLoss
    weight: list[int]


@dataclass(kw_only=True, slots=True, frozen=True)
class LoaderOptions:
    """The arguments of `load`, with the data set's defaults in place of None."""

    batch_size: int
    test_batch_size: int
    seed: int
    path: Path | None = None
    n_train: int | None = None
    num_workers: int = 0
    pin_memory: bool = False
    augment: bool = False

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
        self, dataset: Dataset[Row], split: str, *, number: int = 0, in_batches: bool = False
    ) -> DataLoader[Row]:
        """Return the loader of ``"train"``, shuffled, or of ``"val"`` or ``"test"``, in order.

        Loaders with another ``number`` shuffle differently; with ``in_batches`` the data set returns whole batches.
        """
        train = split == "train"
        return row_loader(
            dataset,
            self.batch_size if train else self.test_batch_size,
            shuffle=train,
            seed=self.seed + number,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=as_is if in_batches else None,
        )


@dataclass(kw_only=True, slots=True)
class Splits:
    """The loaders of a data set, one per split, or per split and task.

    ``rows`` are the numbers of rows of the splits, with multi-input data those of the largest task; ``image_size`` is
    (height, width) where the decoders need it; ``build_encoder`` makes an encoder that depends on the data.
    """

    train: Loaders
    val: Loaders | None
    test: Loaders
    rows: dict[str, int]
    image_size: tuple[int, int] | None = None
    build_encoder: Callable[[], nn.Module] | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class DatasetInfo:
    """The description of a data set, and the functions that load it.

    Attributes:
        name: Its name.
        description, source, licence: One line each.
        multi_input: Each task has inputs of its own.
        outputs: Task name to the number of outputs of its decoder.
        rows: Split to its number of rows by default.
        encoders: Names in ``ENCODERS`` that fit; the first is the default.
        load_splits: Creates the loaders.
        make_task: Creates the entry of one task in ``task_dict``, with new metrics and losses.
        make_head: Creates a decoder from the encoder's channels and the number of outputs, and from ``size`` if the
            splits have an ``image_size``.
        needs_path: The data must be given as a folder.
        batch_size, test_batch_size: Default rows of a batch of training, and of validation and test.
        in_memory: The data are in memory, so that worker processes would only slow loading down.
    """

    name: str
    description: str
    source: str
    licence: str
    multi_input: bool
    outputs: dict[str, int]
    rows: dict[str, int]
    encoders: tuple[str, ...]
    load_splits: Callable[[LoaderOptions], Splits]
    make_task: Callable[[str], Task]
    make_head: Callable[..., nn.Module]
    needs_path: bool = False
    batch_size: int = 64
    test_batch_size: int = 256
    in_memory: bool = False


@dataclass(kw_only=True, slots=True)
class DataBundle:
    """A loaded data set, in the form ``Trainer`` takes.

    Attributes:
        name, description, source, licence, outputs, batch_size, test_batch_size: As of `DatasetInfo`.
        multi_input: Each task has its own inputs; the loaders are then dictionaries by task.
        task_dict: LibMTL's ``task_dict``: per task ``metrics``, ``metrics_fn``, ``loss_fn``, ``weight``.
        train: Batches of ``(inputs, {task: labels})``, or of ``(inputs, labels)`` per task if ``multi_input``.
        val, test: The same, in order; ``val`` is None if the data set has no such split.
        rows: Split to its number of rows (per task, if ``multi_input``).
        encoder: Name of the encoder.
        encoder_class: Creates a new encoder at each call.
        feature_dim: Channels of the encoder's output.
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
    make_head: Callable[..., nn.Module] = field(repr=False)

    def decoders(self) -> nn.ModuleDict:
        """Return new decoders, one per task, for the encoder's output."""
        return nn.ModuleDict({task: self.make_head(self.feature_dim, units) for task, units in self.outputs.items()})


DATASETS: dict[str, DatasetInfo] = {}


def register(infos: Iterable[DatasetInfo]) -> None:
    """Add data sets to ``DATASETS``."""
    DATASETS.update({info.name: info for info in infos})


def load(
    name: str,
    *,
    batch_size: int | None = None,
    test_batch_size: int | None = None,
    seed: int = 0,
    path: str | Path | None = None,
    n_train: int | None = None,
    num_workers: int | None = None,
    pin_memory: bool = False,
    augment: bool = False,
    encoder: str | None = None,
    pretrained: bool = False,
) -> DataBundle:
    """Load a data set by name, in any case.

    Args:
        name: A name of ``DATASETS``.
        batch_size: Rows of a training batch (of each task, for multi-input data); the data set's default if None. The
            last incomplete batch is dropped.
        test_batch_size: Rows of a batch of validation and test; the data set's default if None.
        seed: Seed of the order of the training rows; the rows do not depend on it.
        path: A folder to read the data from, where the data set allows one.
        n_train: Number of training rows; the data set's default if None.
        num_workers: Worker processes of each loader. If None: none for data in memory or without ``pin_memory``,
            otherwise up to 4, where the loaders of all tasks share all cores but one.
        pin_memory: Page-lock the batches, for copies to a GPU.
        augment: Use the random augmentation of the training rows, where the data set has one.
        encoder: A name of ``ENCODERS`` that fits the data set; its default if None.
        pretrained: Initialise the encoder with ImageNet's weights.

    Raises:
        UsageError: An unknown name, a missing folder, an encoder without weights, or too few rows for a batch.
    """
    info = resolve_name(name, DATASETS, "data set")
    chosen = resolve_name(encoder or info.encoders[0], {e: e for e in info.encoders}, f"encoder of {info.name}")
    if pretrained and not ENCODERS[chosen].has_weights:
        raise UsageError(f"pretrained must be off for the encoder {chosen}: it has no pretrained weights.")
    if path is None and info.needs_path:
        raise UsageError(f"The data set {info.name} is not in the package: give its folder as dataset_path.")
    folder = None if path is None else Path(path).expanduser()
    if folder is not None and not folder.is_dir():
        raise UsageError(f"The data folder {str(path)!r} does not exist.")
    options = LoaderOptions(
        batch_size=info.batch_size if batch_size is None else batch_size,
        test_batch_size=info.test_batch_size if test_batch_size is None else test_batch_size,
        seed=seed,
        path=folder,
        n_train=n_train,
        num_workers=_default_workers(info, pin_memory) if num_workers is None else num_workers,
        pin_memory=pin_memory,
        augment=augment,
    )
    splits, about = info.load_splits(options), ENCODERS[chosen]
    return DataBundle(
        name=info.name,
        description=info.description,
        source=info.source if folder is None else str(folder),
        licence=info.licence if folder is None else "as of the folder's data",
        multi_input=info.multi_input,
        task_dict={task: dict(info.make_task(task)) for task in info.outputs},
        train=splits.train,
        val=splits.val,
        test=splits.test,
        rows=splits.rows,
        batch_size=options.batch_size,
        test_batch_size=options.test_batch_size,
        encoder=chosen,
        encoder_class=splits.build_encoder or (partial(about.build, pretrained=True) if pretrained else about.build),
        feature_dim=about.feature_dim,
        outputs=dict(info.outputs),
        make_head=info.make_head if splits.image_size is None else partial(info.make_head, size=splits.image_size),
    )


def _default_workers(info: DatasetInfo, pin_memory: bool) -> int:
    # Without a GPU the step keeps all cores busy; with one, the main process needs a core.
    if info.in_memory or not pin_memory:
        return 0
    loaders = len(info.outputs) if info.multi_input else 1
    return min(4, ((os.cpu_count() or 1) - 1) // loaders)


def describe_all() -> list[dict[str, str]]:
    """Return one row per data set for a table: name, description, tasks, rows, source and licence."""
    return [
        {
            "name": info.name,
            "description": info.description,
            "tasks": ", ".join(f"{task} ({units})" for task, units in info.outputs.items()),
            "inputs": "one per task" if info.multi_input else "shared",
            "rows": ", ".join(f"{count:,} {split}" for split, count in info.rows.items()),
            "encoders": ", ".join(info.encoders),
            "source": info.source,
            "licence": info.licence,
        }
        for info in DATASETS.values()
    ]
