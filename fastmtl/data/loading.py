"""From the name of a data set to its loaders, tasks, encoder and decoders."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fastmtl.data.encoders import find_encoder
from fastmtl.data.negatives import Negatives, NegativeSampler
from fastmtl.data.registry import DataBundle, DatasetInfo, Facts, LoaderOptions, Splits, find_dataset
from fastmtl.data.tasks import TaskInfo, kind_of, with_named
from fastmtl.errors import UsageError
from fastmtl.model.info import EncoderInfo
from fastmtl.support.named import Found, own_place

__all__ = ["Parts", "load", "parts_of"]


@dataclass(kw_only=True, slots=True)
class Parts:
    """What a network is made of, and what its predictions mean; it needs none of the data.

    Attributes:
        info: The data set.
        encoder: The encoder's name and what is known of it.
        encoder_class: Creates a new encoder at each call.
        tasks: The tasks.
        make_heads: Task name to the function that creates its decoder from the channels and the number of outputs.
        facts: What is known of the data.
    """

    info: DatasetInfo
    encoder: Found[EncoderInfo]
    encoder_class: Callable[[], nn.Module]
    tasks: dict[str, TaskInfo]
    make_heads: dict[str, Callable[[int, int], nn.Module]]
    facts: Facts

    def decoders(self) -> nn.ModuleDict:
        """Return new decoders, one per task, for the encoder's output."""
        width = self.encoder.value.feature_dim
        return nn.ModuleDict({name: self.make_heads[name](width, task.outputs) for name, task in self.tasks.items()})


def parts_of(
    info: DatasetInfo,
    encoder: Found[EncoderInfo],
    facts: Facts,
    *,
    pretrained: bool = False,
) -> Parts:
    """Return what a network on a data set is made of.

    Args:
        info: The data set.
        encoder: The encoder, as of `find_encoder`.
        facts: What is known of the data, ``image_size`` among it.
        pretrained: Start from the encoder's weights.

    Raises:
        UsageError: The encoder has no weights.
    """
    if pretrained and not encoder.value.has_weights:
        raise UsageError(f"pretrained must be off for the encoder {encoder.name}: it has no pretrained weights.")
    options: dict[str, Any] = {"pretrained": True} if pretrained else {}
    if encoder.value.takes_vectors:
        if "width" not in facts:
            raise UsageError(f"The encoder {encoder.name} reads vectors, which the inputs of {info.name} are not.")
        options["inputs"] = facts["width"]
    if encoder.value.takes_facts:
        options["facts"] = facts
    tasks, size = info.tasks_of(facts), facts.get("image_size")
    return Parts(
        info=info,
        encoder=encoder,
        encoder_class=partial(encoder.value.build, **options) if options else encoder.value.build,
        tasks=tasks,
        make_heads={name: _head(info, name, task, size) for name, task in tasks.items()},
        facts=facts,
    )


def _head(info: DatasetInfo, name: str, task: TaskInfo, size: Sequence[int] | None) -> Callable[[int, int], nn.Module]:
    """Return what creates the decoder of a task from the channels and the number of outputs."""
    if not task.maps:
        return task.make_head
    if size:
        return partial(task.make_head, size=tuple(size))
    needed = inspect.signature(task.make_head).parameters.get("size")
    if needed is not None and needed.default is inspect.Parameter.empty:
        raise UsageError(
            f"{own_place(info.load_splits)}The task {name} of the data set {info.name} predicts maps, whose size it "
            "must say: options.splits(..., image_size=(height, width))."
        )
    return task.make_head


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
    encoder_args: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    stages: bool = False,
    loss: Mapping[str, Any] | None = None,
    metric: Mapping[str, Any] | None = None,
    inputs: tuple[str, ...] | list[str] = (),
    tasks: Mapping[str, Any] | None = None,
    negatives: Mapping[str, float] | None = None,
    stream: bool | None = None,
) -> DataBundle:
    """Load a data set by name, in any case.

    Args:
        name: A name of ``DATASETS``, of an entry point of the group ``fastmtl.datasets``, ``module:name`` or
            ``file.py:name``, see `find_dataset`.
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
        encoder: The name of an encoder that fits the data set, see `find_encoder`; its default if None.
        encoder_args: Arguments of the encoder.
        pretrained: Initialise the encoder with the weights it comes with, such as ImageNet's.
        stages: Whether the architecture needs the encoder's stages.
        loss: Task to the name of its loss, in place of the data set's own, see `with_named`.
        metric: Task to the name of its metric, likewise.
        inputs: Columns that are the inputs, for data with columns.
        tasks: What each task is, for data with columns.
        negatives: A task and its negatives for each positive in an epoch, ``{"click": 4}``, for tables; see
            `NegativeSampler`. All rows if None.
        stream: Read the rows of ``parquet`` when they are needed, a few groups of rows at a time; if None, where the
            files are larger than 1 GiB and can be read so.

    Raises:
        UsageError: An unknown name, a missing folder, an encoder without weights, too few rows for a batch, or
            negatives of what is no table.
    """
    info = find_dataset(name).value
    chosen = find_encoder(
        encoder or (info.encoders or ("conv",))[0],
        encoder_args,
        stages=stages,
        fitting=info.encoders,
        of=info.name,
    )
    if pretrained and not chosen.value.has_weights:
        raise UsageError(f"pretrained must be off for the encoder {chosen.name}: it has no pretrained weights.")
    if not info.has_columns and (inputs or tasks):
        raise UsageError(
            f"inputs and tasks are for data with columns (parquet, datasets, webdataset), not {info.name}."
        )
    if stream and not info.streams:
        raise UsageError(f"stream is for the data set parquet, not {info.name}.")
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
        encoder=chosen.value,
        inputs=tuple(inputs),
        tasks=dict(tasks or {}),
        negatives=Negatives.of(negatives),
        stream=stream,
        place=own_place(info.load_splits),
    )
    splits = info.load_splits(options)
    if not isinstance(splits, Splits):
        raise UsageError(
            f"{own_place(info.load_splits)}load_splits of the data set {info.name} must return Splits, as "
            f"options.splits(train=..., test=...) makes them, it returned "
            f"{'nothing' if splits is None else f'a {type(splits).__name__}'}."
        )
    if options.negatives is not None:
        _tell_sampled(splits, options.negatives, info)
    size = {} if splits.image_size is None else {"image_size": list(splits.image_size)}
    parts = parts_of(info, chosen, {**splits.facts, **size}, pretrained=pretrained)
    task_dict = {task: dict(about.task()) for task, about in parts.tasks.items()}
    return DataBundle(
        name=info.name,
        description=info.description,
        source=info.source if folder is None else str(folder),
        licence=info.licence if folder is None else "as of the folder's data",
        multi_input=info.multi_input,
        task_dict=with_named(task_dict, loss or {}, metric or {}),
        train=splits.train,
        val=splits.val,
        test=splits.test,
        rows=splits.rows,
        batch_size=options.batch_size,
        test_batch_size=options.test_batch_size,
        encoder=chosen.name,
        encoder_class=splits.build_encoder or parts.encoder_class,
        feature_dim=chosen.value.feature_dim,
        outputs={task: about.outputs for task, about in parts.tasks.items()},
        make_heads=parts.make_heads,
        facts=parts.facts,
        labels={task: about.labels for task, about in parts.tasks.items() if about.labels},
        kinds={task: kind_of(about) for task, about in task_dict.items()},
        builds_encoder=splits.build_encoder is not None,
    )


def _tell_sampled(splits: Splits, negatives: Negatives, info: DatasetInfo) -> None:
    """Print what an epoch has of the negatives, and keep it among the facts.

    Raises:
        UsageError: The data set has made a loader that has all of them.
    """
    sampler = getattr(splits.train, "sampler", None)
    if not isinstance(sampler, NegativeSampler):
        raise UsageError(f"negatives are for tables with labels by task, such as clicks, not for {info.name}.")
    splits.facts["negatives"] = {"task": negatives.task, "rate": sampler.rate}
    print(
        f"{info.name}: an epoch has {len(sampler):,} rows, all {len(sampler.positives):,} positives of "
        f"{negatives.task} and {sampler.drawn:,} of {len(sampler.negatives):,} negatives"
    )


def _default_workers(info: DatasetInfo, pin_memory: bool) -> int:
    # Without a GPU the step keeps all cores busy; with one, the main process needs a core.
    if info.in_memory or not pin_memory:
        return 0
    given = info.tasks if isinstance(info.tasks, Mapping) else info.outputs
    # Tasks that are made of facts are not known before the data are loaded.
    loaders = max(len(given), 1) if info.multi_input else 1
    return min(4, ((os.cpu_count() or 1) - 1) // loaders)
