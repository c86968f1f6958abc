"""With shards of the parameters no process holds more of the gradients than docs/distributed.md says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmtl.distributed import find_peers, gradient_shards, shard
from fastmtl.model import MLPEncoder
from fastmtl.trainer.log.records import StepBuffer
from tests.distributed.group import TASKS, in_processes
from tests.trainer.toy import fill_grads, loaders, make_trainer

WIDTH, DEPTH = 128, 8
BUCKET = WIDTH * WIDTH + WIDTH
SHARED = 6 * WIDTH + WIDTH + (DEPTH - 1) * BUCKET + WIDTH * 8 + 8


class _Live(TorchDispatchMode):
    """Counts the elements of tensors that operators made and that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given = {_id_of(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor) and _id_of(each) not in given:
                storage = each.untyped_storage()
                self._held[_id_of(each)] = StorageWeakRef(storage), storage.nbytes() // each.element_size()
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return found


def _id_of(tensor: torch.Tensor) -> int:
    """Return what tells storages apart."""
    found: int = tensor.untyped_storage()._cdata
    return found


def _measure(weightings: list[str]) -> list[int]:
    peers = find_peers()
    assert peers is not None
    peaks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_shards, "BUCKET_BYTES", 8 * BUCKET)
        for weighting in weightings:
            encoder = partial(MLPEncoder, 6, [WIDTH] * DEPTH + [8])
            trainer = make_trainer(weighting, "HPS", TASKS, encoder_class=encoder, shard="fsdp")
            first, second = list(shard(loaders(TASKS), peers))[:2]
            trainer.step([first], StepBuffer())
            trainer.step.comm.unshard()
            with _Live() as live:
                fill_grads(trainer, [second])
            peaks.append(live.peak)
    return peaks


@pytest.mark.slow
def test_gradients_of_four_processes(tmp_path: Path) -> None:
    size, buckets = 4, 2
    for rows, total in in_processes(size, tmp_path, _measure, ["MGDA", "EW"]):
        assert TASKS * SHARED / size < rows <= (TASKS + 1) * SHARED / size + buckets * BUCKET
        assert SHARED / size < total <= 2 * SHARED / size + buckets * BUCKET
