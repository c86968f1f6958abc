"""Batches from the loaders of one input for all tasks, or of one for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import Subset

from fastmtl.engine.trees import map_tree
from fastmtl.errors import UsageError
from fastmtl.support.named import own_place

__all__ = [
    "Loader",
    "Loaders",
    "Pair",
    "by_task",
    "check_loaders",
    "count_batches",
    "eval_batches",
    "generators",
    "place_of_data",
    "to_channels_last",
    "to_device",
    "train_batches",
]

Tree = TypeVar("Tree")

# Inputs and labels, of any form.
Pair = tuple[Any, Any]


class Loader(Protocol):
    """Gives its batches whenever it is iterated over."""

    def __iter__(self) -> Iterator[object]: ...

    def __len__(self) -> int: ...


# Containers without `to`, which most batches are of.
_PLAIN = (dict, list, tuple)
# One for all tasks, or one for each.
Loaders = Loader | Mapping[str, Loader]


def by_task(loaders: Loaders, multi_input: bool) -> Mapping[str | None, Loader]:
    """Return the loaders by task; the one for all of them by None."""
    return cast(Mapping[str | None, Loader], loaders) if multi_input else {None: loaders}


def to_device(value: Tree, device: torch.device) -> Tree:
    """Move tensors, and whatever else has ``to``, in any containers to ``device`` without waiting."""

    def moves(leaf: object) -> bool:
        if type(leaf) in _PLAIN:
            return False
        # Entries of some dictionaries are attributes too, and some have an answer for every name.
        return hasattr(type(leaf) if isinstance(leaf, Mapping) else leaf, "to")

    def moved(leaf: Any) -> Any:
        if type(leaf) is Tensor and leaf.device == device:
            return leaf
        return leaf.to(device, non_blocking=True) if moves(leaf) else leaf

    return map_tree(moved, value, is_leaf=moves)


def to_channels_last(value: Tree) -> Tree:
    """Return a batch's inputs with images, the tensors of four dimensions, in channels-last memory format."""

    def turned(leaf: object) -> object:
        if isinstance(leaf, Tensor) and leaf.dim() == 4:
            return leaf.contiguous(memory_format=torch.channels_last)
        return leaf

    return map_tree(turned, value)


def check_loaders(loaders: Loaders, tasks: list[str], multi_input: bool, what: str) -> None:
    """Refuse loaders that are empty or do not fit the tasks, and say which and why."""
    if isinstance(loaders, Mapping) and not multi_input:
        raise UsageError(f"{what} must be one loader when multi_input is False, got a dictionary.")
    if multi_input and not isinstance(loaders, Mapping):
        raise UsageError(
            f"{what} must be a dictionary of loaders by task when multi_input is True, got {type(loaders).__name__}."
        )
    given = by_task(loaders, multi_input)
    for task, name in _names(tasks, multi_input, what):
        if task not in given:
            raise UsageError(f"{what} has no loader for the task {task!r}, only for {', '.join(map(str, given))}.")
        try:
            empty = len(given[task]) == 0
        except TypeError:
            kind = type(given[task]).__name__
            raise UsageError(f"{name} must be a loader of known length, got a {kind}, which has none.") from None
        if empty:
            of_task = "" if task is None else f" for the task {task!r}"
            raise UsageError(
                f"{what} is empty{of_task}: the data set has no rows, or fewer than one batch with drop_last."
            )


def _names(tasks: list[str], multi_input: bool, what: str) -> list[tuple[str | None, str]]:
    """Return the loaders' tasks, None for all of them, and how messages name the loaders."""
    return [(task, f"{what}[{task!r}]") for task in tasks] if multi_input else [(None, what)]


def generators(loaders: Loaders, multi_input: bool) -> list[torch.Generator]:
    """Return the random generators the loaders have of their own, which draw the order of the rows."""
    unique: list[torch.Generator] = []
    for loader in by_task(loaders, multi_input).values():
        of_batches = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), of_batches):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and not any(generator is other for other in unique):
                unique.append(generator)
    return unique


def count_batches(loaders: Loaders, multi_input: bool, limit: int | None) -> int:
    """Return the number of training steps in an epoch: the longest loader's."""
    count = max(map(len, by_task(loaders, multi_input).values()))
    return count if limit is None else min(count, limit)


def train_batches(
    loaders: Loaders,
    tasks: list[str],
    multi_input: bool,
    count: int,
    begun: Mapping[str | None, Iterator[object]] | None = None,
) -> Iterator[Pair]:
    """Yield ``count`` batches of inputs and labels, anything else is refused; a loader that runs out starts again.

    Args:
        loaders: The loaders.
        tasks: The tasks.
        multi_input: Whether each task has a loader.
        count: The number of batches.
        begun: Iterators over the loaders that are taken up where they are, which may be at their end.
    """
    given, begun = by_task(loaders, multi_input), begun or {}
    names = _names(tasks, multi_input, "train_dataloaders")
    streams = {task: _endless(given[task], name, begun.get(task)) for task, name in names}
    for _ in range(count):
        batch = {task: next(stream) for task, stream in streams.items()}
        if multi_input:
            yield {task: pair[0] for task, pair in batch.items()}, {task: pair[1] for task, pair in batch.items()}
        else:
            inputs, labels = batch[None]
            yield inputs, _checked(labels, tasks, given[None])


def eval_batches(
    loaders: Loaders, tasks: list[str], multi_input: bool, limit: int | None, what: str
) -> Iterator[tuple[str | None, Any, Any]]:
    """Yield (task or None, inputs, labels) of every batch once; anything else is refused."""
    given = by_task(loaders, multi_input)
    for task, name in _names(tasks, multi_input, what):
        for batch in islice(given[task], limit):
            inputs, labels = _pair(batch, name, given[task])
            yield task, inputs, labels if multi_input else _checked(labels, tasks, given[task])


def place_of_data(loader: Any) -> str:
    """Return ``"file:line: "`` of the data set of a loader where it is the user's, else ``""``."""
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    # Rows in a list or in a data set of torch's are known by the function that put them there.
    place: str = own_place(type(dataset)) or getattr(getattr(loader, "collate_fn", None), "place", "")
    return place


def _endless(loader: Loader, what: str, begun: Iterator[object] | None) -> Iterator[Pair]:
    for batch in begun or ():
        yield _pair(batch, what, loader)
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield _pair(batch, what, loader)
        if empty:
            raise UsageError(
                f"{what} has a length of {len(loader)} but gave no batch: a loader must start again whenever it is "
                "iterated over, which an iterator does not."
            )


def _pair(batch: object, what: str, loader: Loader) -> Pair:
    # A tensor or a dictionary of two could be unpacked as well, into rows or keys.
    if isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, labels = batch
        return inputs, labels
    got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
    raise UsageError(f"{place_of_data(loader)}{what} must yield batches that are pairs (inputs, labels), got {got}.")


def _checked(labels: object, tasks: list[str], loader: Loader) -> Mapping[str, object]:
    if not isinstance(labels, Mapping):
        raise UsageError(
            f"{place_of_data(loader)}The labels of a batch must be a dictionary by task, got {type(labels).__name__}."
        )
    missing = [task for task in tasks if task not in labels]
    # A name nobody knows is a slip of the pen; a task left out has no labels in this batch, or in this process's part.
    if missing and any(name not in tasks for name in labels):
        raise UsageError(
            f"{place_of_data(loader)}A batch has no labels for the task {missing[0]!r}, only for "
            f"{', '.join(map(str, labels))}."
        )
    return labels
