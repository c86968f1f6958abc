"""What a step sends is what docs/distributed.md says, by the ring model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fastmtl.distributed import find_peers, peers, shard
from fastmtl.model import MLPEncoder
from fastmtl.trainer.log.records import StepBuffer
from tests.distributed.group import TASKS, in_processes
from tests.trainer.toy import Listener, force_way, loaders, make_trainer

SHARED = 6 * 200 + 200 + 200 * 8 + 8
OWN = 2 * (8 * 3 + 3) + 8 + 1
CASES: list[tuple[str, dict[str, Any], float]] = [
    ("MGDA", {}, (TASKS + 1) * SHARED + 2 * OWN),
    ("Nash_MTL", {}, (TASKS + 1) * SHARED + 2 * OWN),
    ("MoCo", {}, (TASKS + 1) * SHARED + 2 * OWN),
    ("MGDA", {"gram": "local"}, 2 * (SHARED + OWN)),
    ("MGDA", {"rep_grad": True}, 2 * (SHARED + OWN + TASKS * 8)),
    ("EW", {}, 2 * (SHARED + OWN)),
    ("MGDA", {"shard": "fsdp"}, (TASKS + 1) * SHARED + 2 * OWN),
    # T sketches of width k and T rows of what is not sketched, all-reduced, the sums of the layers' inputs, and one
    # gradient of what is sketched.
    ("MGDA", {"vjps": "sketch", "sketch_width": 2}, 2 * (TASKS * (2 * 208 + 208) + 206 + 6 * 200 + 200 * 8 + OWN)),
    ("MGDA", {"groups": "module", "vjps": "blockwise"}, (TASKS + 1) * SHARED + 2 * OWN),
    ("MGDA", {"groups": "module", "vjps": "blockwise", "shard": "fsdp"}, (TASKS + 1) * SHARED + 2 * OWN),
    ("MoCo", {"shard": "fsdp"}, (TASKS + 1) * SHARED + 2 * OWN),
    ("EW", {"shard": "fsdp"}, 2 * (SHARED + OWN)),
]


def _count(given: list[tuple[str, dict[str, Any]]]) -> list[float]:
    """Return for each case the elements of messages greater than (T, T) that a process sends in its second step."""
    return [_count_step(weighting, options) for weighting, options in given]


def _count_step(weighting: str, options: dict[str, Any]) -> float:
    group = find_peers()
    assert group is not None
    options = {"encoder_class": lambda: MLPEncoder(6, [200, 8]), **options}
    with pytest.MonkeyPatch.context() as patch:
        if options.get("vjps") == "sketch":
            force_way(patch, "sketched")
        listener = Listener()
        sent = _count_second(make_trainer(weighting, "HPS", TASKS, logger=listener, **options), group)
        assert not any("all groups at once" in message for message in listener.messages)
        return sent


def _count_second(trainer: Any, group: Any) -> float:
    first, second = list(shard(loaders(TASKS), group))[:2]
    trainer.step([first], StepBuffer())
    sent = 0.0

    def counted(function: Callable[..., Any], place: int, passes: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            count = args[place].numel()
            sent += passes * count * (group.size - 1) / group.size if count > TASKS * TASKS else 0
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted(dist.all_reduce, 0, 2))
        patch.setattr(peers, "_reduce_scatter", counted(peers._reduce_scatter, 1, 1))
        patch.setattr(peers, "_all_gather", counted(peers._all_gather, 0, 1))
        # FSDP gathers parameters by one of its names.
        for name in ("all_gather_single", "all_gather_into_tensor"):
            if hasattr(dist, name):
                patch.setattr(dist, name, counted(getattr(dist, name), 0, 1))
        trainer.step([second], StepBuffer())
    return sent


def _padded_own(size: int) -> int:
    three, one = -(-3 // size) * size, size
    return 2 * (8 * three + three) + 8 * one + one


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_elements_sent(tmp_path: Path, size: int) -> None:
    for found in in_processes(size, tmp_path, _count, [case[:2] for case in CASES]):
        for sent, (weighting, options, wanted) in zip(found, CASES, strict=True):
            # Shards are as long as the longest: decoders, two of 3 outputs and one of 1, are padded to a multiple of W.
            wanted += 2 * (_padded_own(size) - OWN) if "shard" in options else 0
            assert sent == pytest.approx(wanted * (size - 1) / size, rel=0.01), (weighting, options)
