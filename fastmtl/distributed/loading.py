"""Loaders that give each process its part of every batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from fastmtl.distributed.peers import Peers
from fastmtl.errors import UsageError

__all__ = ["shard"]


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
    names = ("collate_fn", "generator", "num_workers", "persistent_workers", "pin_memory")
    options: dict[str, Any] = {name: getattr(loaders, name) for name in names}
    return DataLoader(loaders.dataset, batch_sampler=_Parts(batches, peers, whole), **options)


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

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            indices = batch[self.peers.rank :: self.peers.size]
            if indices and (self.whole or len(batch) >= self.peers.size):
                yield indices
