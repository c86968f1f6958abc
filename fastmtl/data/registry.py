"""The data sets by name, each with everything a run needs: loaders, tasks, encoder and decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from fastmtl.errors import UsageError
from fastmtl.names import resolve_name

__all__ = ["DATASETS", "ENCODERS", "DataBundle", "DatasetInfo", "EncoderInfo", "LoaderOptions", "describe_all", "load"]

Loaders = DataLoader[Any] | dict[str, DataLoader[Any]]


@dataclass(kw_only=True, slots=True, frozen=True)
class EncoderInfo:
    """An encoder a data set may use: how to build it, and the number of channels it gives out."""

    build: Callable[[], nn.Module]
    feature_dim: int


@dataclass(kw_only=True, slots=True, frozen=True)
class LoaderOptions:
    """How a data set is to be loaded.

    Attributes:
        batch_size: Rows of a training batch (of each task, for multi-input data).
        test_batch_size: Rows of a batch of validation and test.
        seed: Draws the order of the training rows. The rows themselves do not depend on it.
        path: A folder to read from, where the data set allows one.
        n_train: Number of training rows; the data set's own number if None.
        num_workers: Worker processes of each loader.
        pin_memory: Page-lock the batches, for copies to a GPU.
        augment: Change the training rows at random each time, where the data set knows how.
    """

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
        if self.n_train is not None and self.n_train < self.batch_size:
            raise UsageError(
                f"n_train must be at least batch_size ({self.batch_size}) to give a whole batch, got {self.n_train}."
            )


@dataclass(kw_only=True, slots=True)
class Splits:
    """The loaders of a data set and how many rows each split has (per task, for multi-input data)."""

    train: Loaders
    val: Loaders
    test: Loaders
    rows: dict[str, int]


@dataclass(kw_only=True, slots=True, frozen=True)
class DatasetInfo:
    """What there is to know of a data set without loading it.

    Attributes:
        name: The name users write.
        description: One line.
        source: Where the data come from, one line.
        licence: The licence of the data, one line.
        multi_input: Each task has inputs of its own.
        outputs: Task name to the number of outputs of its decoder.
        rows: Split to its number of rows by default.
        encoders: Names in ``ENCODERS`` that fit; the first is the default.
        load_splits: Makes the loaders.
        make_task: Makes the entry of one task in ``task_dict``, with metrics and losses of its own.
        make_head: Makes a decoder from the encoder's channels and the number of outputs.
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
    make_task: Callable[[str], dict[str, Any]]
    make_head: Callable[[int, int], nn.Module]


@dataclass(kw_only=True, slots=True)
class DataBundle:
    """A loaded data set, in the form ``Trainer`` takes.

    Attributes:
        name: The data set's name.
        description: One line.
        source: Where the data come from.
        licence: The licence of the data.
        multi_input: Each task has inputs of its own; the loaders are then dicts by task.
        task_dict: LibMTL's ``task_dict``: per task ``metrics``, ``metrics_fn``, ``loss_fn``, ``weight``.
        train: Batches of ``(inputs, {task: labels})``, or of ``(inputs, labels)`` per task if ``multi_input``.
        val: As ``train``, in order.
        test: As ``train``, in order.
        rows: Split to its number of rows (per task, if ``multi_input``).
        encoder: Name of the encoder.
        encoder_class: Builds a new encoder at each call.
        feature_dim: Channels of the encoder's output.
        outputs: Task name to the number of outputs of its decoder.
    """

    name: str
    description: str
    source: str
    licence: str
    multi_input: bool
    task_dict: dict[str, dict[str, Any]]
    train: Loaders
    val: Loaders
    test: Loaders
    rows: dict[str, int]
    encoder: str
    encoder_class: Callable[[], nn.Module]
    feature_dim: int
    outputs: dict[str, int]
    make_head: Callable[[int, int], nn.Module] = field(repr=False)

    def decoders(self) -> nn.ModuleDict:
        """Return new decoders, one per task, for the encoder's output."""
        return nn.ModuleDict({task: self.make_head(self.feature_dim, units) for task, units in self.outputs.items()})


def _resnet(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from fastmtl import model

        return getattr(model, name)()

    return build


def _conv() -> nn.Module:
    from fastmtl.model import ConvEncoder

    return ConvEncoder(channels=3, stage_dims=(16, 32, 64))


ENCODERS: dict[str, EncoderInfo] = {
    "resnet18": EncoderInfo(build=_resnet("resnet18"), feature_dim=512),
    "resnet34": EncoderInfo(build=_resnet("resnet34"), feature_dim=512),
    "resnet50": EncoderInfo(build=_resnet("resnet50"), feature_dim=2048),
    "conv": EncoderInfo(build=_conv, feature_dim=64),
}
IMAGE_ENCODERS = tuple(ENCODERS)

DATASETS: dict[str, DatasetInfo] = {}


def register(infos: Iterable[DatasetInfo]) -> None:
    """Add data sets to ``DATASETS``."""
    DATASETS.update({info.name: info for info in infos})


def load(
    name: str,
    *,
    batch_size: int,
    test_batch_size: int = 256,
    seed: int = 0,
    path: str | Path | None = None,
    n_train: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    augment: bool = False,
    encoder: str | None = None,
) -> DataBundle:
    """Load a data set by name, in any case.

    Args:
        name: A name of ``DATASETS``.
        batch_size: Rows of a training batch; a last incomplete one is dropped.
        test_batch_size: Rows of a batch of validation and test.
        seed: Draws the order of the training rows; the rows are the same for every seed.
        path: A folder to read the data from, where the data set allows one.
        n_train: Number of training rows.
        num_workers: Worker processes of each loader; none are needed for data in memory.
        pin_memory: Page-lock the batches, for copies to a GPU.
        augment: Change the training rows at random each time.
        encoder: A name of ``ENCODERS`` that fits the data set; its default if None.

    Raises:
        UsageError: An unknown name, a missing folder, or a number of rows that gives no batch.
    """
    info = resolve_name(name, DATASETS, "data set")
    chosen = resolve_name(encoder or info.encoders[0], {e: e for e in info.encoders}, f"encoder of {info.name}")
    folder = None if path is None else Path(path).expanduser()
    if folder is not None and not folder.is_dir():
        raise UsageError(f"The data folder {str(path)!r} does not exist.")
    splits = info.load_splits(
        LoaderOptions(
            batch_size=batch_size,
            test_batch_size=test_batch_size,
            seed=seed,
            path=folder,
            n_train=n_train,
            num_workers=num_workers,
            pin_memory=pin_memory,
            augment=augment,
        )
    )
    return DataBundle(
        name=info.name,
        description=info.description,
        source=info.source if folder is None else str(folder),
        licence=info.licence if folder is None else "as of the folder's data",
        multi_input=info.multi_input,
        task_dict={task: info.make_task(task) for task in info.outputs},
        train=splits.train,
        val=splits.val,
        test=splits.test,
        rows=splits.rows,
        encoder=chosen,
        encoder_class=ENCODERS[chosen].build,
        feature_dim=ENCODERS[chosen].feature_dim,
        outputs=dict(info.outputs),
        make_head=info.make_head,
    )


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
