"""With shards of the parameters no process holds more of the gradients than docs/distributed.md says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastmtl.distributed import find_peers, gradient_shards, shard
from fastmtl.model import MLPEncoder
from fastmtl.trainer.log.records import StepBuffer
from tests.distributed.group import TASKS, in_processes
from tests.live_memory import LiveMemory
from tests.trainer.toy import fill_grads, loaders, make_trainer

WIDTH, DEPTH = 128, 8
BUCKET = WIDTH * WIDTH + WIDTH
SHARED = 6 * WIDTH + WIDTH + (DEPTH - 1) * BUCKET + WIDTH * 8 + 8


def _measure(given: list[tuple[str, dict[str, Any]]]) -> list[int]:
    peers = find_peers()
    assert peers is not None
    peaks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_shards, "BUCKET_BYTES", 8 * BUCKET)
        for weighting, options in given:
            encoder = partial(MLPEncoder, 6, [WIDTH] * DEPTH + [8])
            trainer = make_trainer(weighting, "HPS", TASKS, encoder_class=encoder, shard="fsdp", **options)
            first, second = list(shard(loaders(TASKS), peers))[:2]
            trainer.step([first], StepBuffer())
            trainer.step.comm.unshard()
            with LiveMemory() as live:
                fill_grads(trainer, [second])
            peaks.append(live.peak)
    return peaks


@pytest.mark.slow
def test_gradients_of_four_processes(tmp_path: Path) -> None:
    size, buckets = 4, 2
    # Activations, and the rest of a block's gradients as the backward pass has them.
    others = 2 * DEPTH * 4 * WIDTH
    cases: list[tuple[str, dict[str, Any]]] = [
        ("MGDA", {}),
        ("EW", {}),
        ("MGDA", {"groups": "module", "vjps": "blockwise"}),
    ]
    for rows, total, blocks in in_processes(size, tmp_path, _measure, cases):
        assert TASKS * SHARED / size < rows <= (TASKS + 1) * SHARED / size + buckets * BUCKET
        assert SHARED / size < total <= 2 * SHARED / size + buckets * BUCKET
        # The update of all blocks; of one block T shards of rows, a row that is being sent, and a row of the next.
        assert (SHARED + TASKS * BUCKET) / size < blocks <= (SHARED + TASKS * BUCKET) / size + buckets * BUCKET + others
