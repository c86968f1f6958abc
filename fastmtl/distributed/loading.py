"""Loaders that give each process its part of every batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch.utils.data import DataLoader
from typing_extensions import override

from fastmtl.distributed.peers import Alone, Peers
from fastmtl.errors import UsageError
from fastmtl.support.kinds import State

__all__ = ["is_shard", "rows_of_batch", "shard"]

_KEPT = (
    *("collate_fn", "generator", "num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "timeout"),
    *("worker_init_fn", "multiprocessing_context", "snapshot_every_n_steps"),
)


def shard(loaders: Any, peers: Peers, *, whole: bool = False) -> Any:
    """Return loaders of this process's rows of each batch of the given loaders.

    The generators of all processes must have the same seed, as they draw the same order. The parts of a batch differ in
    size by one row at most.

    Args:
        loaders: A loader with a batch size, or one for each task.
        peers: The processes.
        whole: Keep all rows, for evaluation: a process may then get one batch fewer than another. Otherwise batches
            with fewer rows than processes are left out.

    Raises:
        UsageError: A loader has no batch sampler, or its batches have fewer rows than there are processes.
    """
    if isinstance(loaders, Mapping):
        return {task: shard(loader, peers, whole=whole) for task, loader in loaders.items()}
    batches = getattr(loaders, "batch_sampler", None)
    if not isinstance(loaders, DataLoader) or batches is None:
        raise UsageError(f"A loader to shard must be a DataLoader with a batch size, got {loaders!r}.")
    if not whole and batches.batch_size < peers.size:
        raise UsageError(
            f"batch_size must be at least {peers.size}, the number of processes, got {batches.batch_size}."
        )
    # A loader with a state keeps its kind, and how often it takes its state.
    kind = type(loaders) if hasattr(loaders, "load_state_dict") else DataLoader
    options: dict[str, Any] = {name: getattr(loaders, name) for name in _KEPT if hasattr(loaders, name)}
    try:
        return kind(loaders.dataset, batch_sampler=_Parts(batches, peers, whole), **options)
    except TypeError as error:
        raise UsageError(
            f"shard cannot make a {kind.__name__} for the rows of one process: its __init__ must take the arguments of "
            f"DataLoader ({error})."
        ) from error


def is_shard(loader: object) -> bool:
    """Return whether a loader is one that :func:`shard` has made."""
    return isinstance(getattr(loader, "batch_sampler", None), _Parts)


def rows_of_batch(loader: object, peers: Peers) -> int | None:
    """Return the rows of a batch of all processes, which call this together; None if the loaders do not tell."""
    batches: Any = getattr(loader, "batch_sampler", None)
    if isinstance(batches, _Parts):
        batches, peers = batches.batches, Alone()
    own: int | None = getattr(batches, "batch_size", None) or getattr(loader, "batch_size", None)
    sizes = [size for size in peers.all_gather_object(own) if size is not None]
    return sum(sizes) if len(sizes) == peers.size else None


@dataclass
class _Parts:
    """The indices of each batch that belong to one process."""

    batches: Any
    peers: Peers
    whole: bool

    def __len__(self) -> int:
        rows, batch = len(self.batches.sampler), self.batches.batch_size
        left = 0 if self.batches.drop_last else rows % batch
        # Evaluation may end one batch earlier here than in another process, training must not.
        return int(rows // batch + (left >= (self.peers.rank + 1 if self.whole else self.peers.size)))

    def __iter__(self) -> _PartsOfPass:
        return _PartsOfPass(self)

    @property
    def sampler(self) -> Any:
        """What draws the order of the rows."""
        return self.batches.sampler


class _PartsOfPass(Iterator[list[int]]):
    """One pass over the parts; its state brings back where it is, by that of the batches' iterator if it has one."""

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts
        self._batches = iter(parts.batches)
        self._taken = 0

    @override
    def __iter__(self) -> Self:
        return self

    @override
    def __next__(self) -> list[int]:
        rank, size = self._parts.peers.rank, self._parts.peers.size
        while True:
            batch = next(self._batches)
            self._taken += 1
            indices: list[int] = batch[rank::size]
            if indices and (self._parts.whole or len(batch) >= size):
                return indices

    def state_dict(self) -> State:
        """Return the place in the pass."""
        batches: Any = self._batches
        return {"taken": self._taken, "batches": batches.state_dict() if hasattr(batches, "state_dict") else None}

    def load_state_dict(self, state: State) -> None:
        """Go to a place, in a pass that has just begun."""
        batches: Any = self._batches
        if state["batches"] is not None:
            batches.load_state_dict(state["batches"])
        for _ in range(0 if state["batches"] is not None else state["taken"]):
            next(batches)
        self._taken = state["taken"]
