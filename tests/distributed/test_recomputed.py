"""Activations that each backward pass computes anew, or that are kept elsewhere: the steps of the plain network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastmtl
from fastmtl.aggregation import MGDA, PCGrad, UPGrad
from fastmtl.distributed import find_peers, shard
from fastmtl.trainer.log.records import StepBuffer
from tests.distributed.group import TASKS, Case, check_as_one, in_processes, train_in_processes
from tests.distributed.recomputing import Block, Deep, prepare
from tests.live_memory import LiveMemory
from tests.trainer.toy import fill_grads, flat, loaders, make_trainer

pytestmark = pytest.mark.usefixtures("in_float64")

WAYS = ("checkpoint", "whole", "wrapped", "within", "cpu", "elsewhere", "offloaded", "both")
FSDP = {"shard": "fsdp"}


def _case(name: str, way: str, options: dict[str, Any] = FSDP, partial_labels: bool = False) -> Case:
    given = {"encoder_class": partial(Deep, way), **options}
    words = [name, way, *("partial" for _ in range(partial_labels)), *(key for key in options if key != "shard")]
    return Case(" ".join(words), name, 8, given, partial=partial_labels)


CASES = [
    *(_case("MGDA", way) for way in WAYS),
    *(_case(name, way) for name in ("PCGrad", "UPGrad", "Nash_MTL", "EW", "MoCo") for way in ("checkpoint", "both")),
    *(_case(name, "both", partial_labels=True) for name in ("UPGrad", "EW")),
    *(_case(name, way, FSDP | {"compile": True}) for name, way in (("MGDA", "checkpoint"), ("EW", "both"))),
    _case("Nash_MTL", "both", FSDP | {"compile": True}, partial_labels=True),
    _case("UPGrad", "both", FSDP | {"accumulate": 2}),
    _case("MGDA", "both", FSDP | {"rep_grad": True}),
    _case("UPGrad", "both", {}),
]
LOOPS = [
    *((name, "wrapped", False) for name in ("MGDA", "UPGrad", "PCGrad")),
    *(("UPGrad", way, deferred) for way in WAYS for deferred in (False, True)),
]
AGGREGATORS = {"MGDA": MGDA, "UPGrad": UPGrad, "PCGrad": PCGrad}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """What each of two processes has after each case."""
    return train_in_processes(2, CASES, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shards_train_as_the_plain_network_in_one_process(case: Case, two: Mapping[str, list[Any]]) -> None:
    plain = {"encoder_class": partial(Deep, "plain")}
    kept = {name: value for name, value in case.options.items() if name not in ("compile", "shard")}
    check_as_one(replace(case, options=kept | plain), two[case.name])


class _Loop(nn.Module):
    """The losses of three tasks; its blocks are sharded, and then itself."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = Deep("plain" if way not in ("checkpoint", "whole", "cpu", "elsewhere") else way, inputs=4)
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(TASKS))
        if find_peers() is not None:
            for block in [module for module in self.modules() if isinstance(module, Block)]:
                fully_shard(block)
        prepare(self.trunk, way)
        if find_peers() is not None:
            fully_shard(self)

    def forward(self, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        features = self.trunk(inputs)
        return [(head(features)[:, 0] - labels[:, t]).square().mean() for t, head in enumerate(self.heads)]


def _loop(given: tuple[str, str, bool]) -> Tensor:
    """Return the parameters after three steps of a user's loop."""
    name, way, deferred = given
    peers = find_peers()
    rank, size = (0, 1) if peers is None else (peers.rank, peers.size)
    net, generator = _Loop(way), torch.Generator().manual_seed(1)
    optimizer, aggregator = torch.optim.SGD(net.parameters(), lr=0.1), AGGREGATORS[name]()
    torch.manual_seed(7)
    for _ in range(3):
        inputs, labels = (torch.randn(12, count, generator=generator)[rank::size] for count in (4, TASKS))
        losses = net(inputs, labels)
        if deferred:
            fastmtl.balanced(losses, shared=net, weighting=aggregator).backward()
        else:
            fastmtl.balance(losses, shared=net, weighting=aggregator)
        optimizer.step()
        optimizer.zero_grad()
    return flat(param.full_tensor() if isinstance(param, DTensor) else param for param in net.parameters())


def _loops(given: list[tuple[str, str, bool]]) -> list[Tensor]:
    return [_loop(case) for case in given]


@pytest.mark.slow
def test_balance_of_sharded_models_is_that_of_plain_ones(tmp_path: Path) -> None:
    wanted = [_loop((name, "plain", deferred)) for name, _, deferred in LOOPS]
    for found in in_processes(2, tmp_path, _loops, LOOPS):
        for case, params, expected in zip(LOOPS, found, wanted, strict=True):
            torch.testing.assert_close(params, expected, rtol=1e-9, atol=1e-12, msg=f"{case}")


def _drop(ways: list[str]) -> list[Tensor]:
    """Return the parameters after training with a dropout that draws a mask for each row."""
    peers = find_peers()
    assert peers is not None
    ends = []
    for way in ways:
        encoder = partial(Deep, way, dropout=partial(nn.Dropout, 0.3))
        trainer: Any = make_trainer("UPGrad", "HPS", TASKS, encoder_class=encoder, shard="fsdp")
        torch.manual_seed(7 + peers.rank)
        for batch in shard(loaders(TASKS), peers):
            trainer.step([batch], StepBuffer())
        trainer.step.comm.unshard()
        ends.append(flat(trainer.model.parameters()))
    return ends


@pytest.mark.slow
def test_each_pass_drops_what_the_forward_pass_has_dropped(tmp_path: Path) -> None:
    for plain, *others in in_processes(2, tmp_path, _drop, ["plain", *WAYS]):
        for way, params in zip(WAYS, others, strict=True):
            torch.testing.assert_close(params, plain, rtol=1e-9, atol=1e-12, msg=way)


WIDTH, DEPTH, ROWS = 8, 12, 1024


def _peaks(ways: list[str]) -> list[int]:
    """Return the elements held at most in a step whose activations are far larger than its parameters."""
    peers = find_peers()
    assert peers is not None
    peaks = []
    for way in ways:
        encoder = partial(Deep, way, WIDTH, DEPTH)
        trainer = make_trainer("UPGrad", "HPS", TASKS, encoder_class=encoder, shard="fsdp")
        first, second = list(shard(loaders(TASKS, 4 * ROWS, 2 * ROWS), peers))[:2]
        trainer.step([first], StepBuffer())
        trainer.step.comm.unshard()
        with LiveMemory() as live:
            fill_grads(trainer, [second])
        peaks.append(live.peak)
    return peaks


@pytest.mark.slow
def test_a_block_at_a_time_has_its_activations(tmp_path: Path) -> None:
    for peaks in in_processes(2, tmp_path, _peaks, ["plain", "checkpoint", "elsewhere"]):
        plain, anew, away = (peak / (ROWS * WIDTH) for peak in peaks)
        of_block = 12
        assert plain > 5 * DEPTH
        # What goes into each block is kept, in all of the T passes.
        assert DEPTH < anew <= DEPTH + of_block + 1
        assert away <= of_block
