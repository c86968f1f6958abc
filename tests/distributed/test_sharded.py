"""With shards of the parameters several processes do what one does with the whole batch, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtl.distributed import find_peers, shard
from tests.distributed.group import (
    DIFFERENT,
    TASKS,
    Case,
    FixedMTAN,
    counted_encoder,
    grouped,
    in_processes,
    learned_tasks,
    normed_encoder,
    train,
    train_all,
)
from tests.trainer.toy import flat, loaders, make_trainer

MMOE = {"architecture": "MMoE", "arch_args": {"img_size": [6], "num_experts": [2]}}
# What these exchange is exchanged by others, too.
ALIKE = ("DWA", "RLW", "IMTL", "DB_MTL", "SDMGrad")
PLAIN = [
    *(Case(name, name) for name in DIFFERENT if name not in ALIKE),
    Case("uneven", "MGDA", batch=9),
    Case("MMoE", "PCGrad", options=MMOE),
    Case("MMoE rows", "MoCo", options=MMOE),
    Case("MTAN", "MGDA", options={"architecture": FixedMTAN}),
    Case("groups", "Nash_MTL", options={"groups": "layer"}),
    Case("batch norm", "MGDA", options={"encoder_class": normed_encoder, "sync_batch_norm": True}),
    Case(
        "batch norm compiled",
        "MGDA",
        options={"encoder_class": counted_encoder, "sync_batch_norm": True, "compile": True},
    ),
    Case("rep", "MGDA", options={"rep_grad": True}),
    Case("GradDrop", "GradDrop", options={"rep_grad": True}),
    Case("multi", "PCGrad", options={"multi_input": True}),
    Case("accumulate", "FairGrad", options={"accumulate": 2}),
    Case("held", "Nash_MTL", options={"update_weights_every": 3}),
    Case("momentum and clip", "MGDA", options={"weight_momentum": 0.5, "clip_grad_norm": 0.1}),
    Case("tasks per step", "PCGrad", options={"tasks_per_step": 2}),
    Case("learned", "MGDA", options={"task_dict": learned_tasks()} | grouped()),
    Case("learned losses", "UW", 5, {"task_dict": learned_tasks(), "accumulate": 2}, partial=True),
    Case("ahead", "AutoLambda", options=grouped()),
    Case("partial losses", "UW", partial=True),
    Case("partial rows", "MoCo", partial=True),
    Case("one task's row", "MConFIG", options={"tasks_per_step": None}),
    Case("compiled", "MGDA", options={"compile": True}),
    Case("compiled MTAN", "CAGrad", options={"architecture": FixedMTAN, "compile": True}),
    Case("compiled rows", "MoCo", options={"compile": True, "accumulate": 2}),
    Case("compiled losses", "UW", options={"compile": True}, partial=True),
    Case("adam", "UPGrad", options={"optim_param": {"optim": "adam", "lr": 1e-2, "weight_decay": 1e-3}}),
]
CASES = [replace(each, options={**each.options, "shard": "fsdp"}) for each in PLAIN]
OF_FOUR = [case for case in CASES if case.name in ("EW", "MGDA", "MoCo", "uneven", "MMoE")]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_float64")]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[int, str], list[Any]]:
    """What each of two and of four processes has after each case."""
    found: dict[tuple[int, str], list[Any]] = {}
    for size, cases in ((2, CASES), (4, OF_FOUR)):
        ranks = in_processes(size, tmp_path_factory.mktemp(str(size)), train_all, cases)
        found |= {(size, case.name): [rank[index] for rank in ranks] for index, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_train_as_one_process(case: Case, several: Mapping[tuple[int, str], list[Any]]) -> None:
    params, losses, scores = train(case)
    for size in (2, 4):
        for of_rank, losses_of_rank, scores_of_rank in several.get((size, case.name), []):
            assert (of_rank - params).norm() <= 1e-9 * params.norm()
            assert torch.allclose(losses_of_rank, losses, rtol=1e-9)
            assert scores_of_rank == pytest.approx(scores, rel=1e-9)


def _half_precision(_: None) -> list[Any]:
    """Return parameters, scale and skipped steps with whole and with sharded parameters, and a flag of one shard."""
    torch.set_default_dtype(torch.float32)
    peers = find_peers()
    assert peers is not None
    ends: list[Any] = []
    for kept in ("none", "fsdp"):
        trainer: Any = make_trainer("Nash_MTL", "HPS", TASKS, shard=kept, precision="fp16", clip_grad_norm=1.0)
        # So large that the first steps overflow.
        trainer.step.scaler.scale.fill_(2.0**24)
        torch.manual_seed(7)
        given = shard(loaders(TASKS, rows=96), peers)
        trainer.train(given, shard(loaders(TASKS), peers, whole=True), 2)
        trainer.step.comm.unshard()
        ends.append((flat(trainer.model.parameters()), *map(float, trainer.step.scaler.logged())))
    params = [param for param in trainer.step.optimizer.params() if param.numel()]
    for param in params:
        param.grad = torch.ones_like(param)
    if peers.is_main_process:
        params[0].grad.fill_(torch.inf)
    scaler = trainer.step.scaler
    flags = []
    for _time in range(2):
        scaler.unscale(params, trainer.step.comm.any_shard)
        flags.append(float(scaler.found_inf))
        if peers.is_main_process:
            params[0].grad.fill_(1.0)
    return [*ends, flags]


def test_float16_of_shards_is_that_of_whole_parameters(tmp_path: Path) -> None:
    for whole, sharded, flags in in_processes(2, tmp_path, _half_precision, None):
        torch.testing.assert_close(sharded[0], whole[0], rtol=1e-4, atol=1e-6)
        assert sharded[1:] == whole[1:]
        assert whole[2] > 0
        # An overflow in one process's shard counts in all of them.
        assert flags == [1.0, 0.0]
