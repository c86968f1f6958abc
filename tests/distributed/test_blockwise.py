"""Blocks of a network one after the other, in several processes: the numbers of all at once in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl.distributed import find_peers, shard
from fastmtl.model import MLPEncoder
from fastmtl.trainer.log.records import StepBuffer
from tests.distributed.group import TASKS, Case, check_as_one, in_processes, train_in_processes
from tests.distributed.looking import Looking
from tests.distributed.recomputing import Deep
from tests.live_memory import LiveMemory
from tests.trainer.grouped import Blocks, Chain, Forked
from tests.trainer.toy import Listener, fill_grads, flat, loaders, make_trainer

pytestmark = pytest.mark.usefixtures("in_float64")

# Dropout would draw other masks in parts of a batch.
ENCODER = partial(Blocks, dropout=0.0)
BLOCKS = {"groups": "module", "vjps": "blockwise", "encoder_class": ENCODER}


def _case(name: str, weighting: str, options: dict[str, Any] | None = None, some: bool = True, batch: int = 8) -> Case:
    return Case(f"{weighting} {name}".strip(), weighting, batch, BLOCKS | (options or {}), partial=some)


FIVE = ("MGDA", "PCGrad", "CAGrad", "UPGrad", "Nash_MTL")
SHARDS = {"shard": "fsdp"}
# No process has as many rows of these layers as another.
ODD = {"encoder_class": partial(MLPEncoder, 6, [7, 5, 8])}
FORKED = {"encoder_class": Forked}
CASES = [
    *(_case("", name, some=False) for name in ("MGDA", "PCGrad")),
    *(_case("partial", name) for name in ("MGDA", "PCGrad", "CAGrad", "UPGrad", "Nash_MTL", "FairGrad", "PCD", "IMTL")),
    # Parts of three and two rows, of which many have no label of some task.
    *(_case("of few rows", name, batch=5) for name in ("UPGrad", "Nash_MTL")),
    _case("layers", "CAGrad", {"groups": "layer", "encoder_class": partial(Chain, again=True)}),
    _case("capped", "Nash_MTL", {"weight_args": {"max_norm": 0.05}}),
    _case("clipped", "UPGrad", {"clip_grad_norm": 0.1}),
    _case("held", "Nash_MTL", {"update_weights_every": 3}),
    _case("tasks per step", "PCGrad", {"tasks_per_step": 2}),
    _case("accumulated", "MGDA", {"accumulate": 2}),
    _case("momentum", "MGDA", {"weight_momentum": 0.5}),
    _case("compiled", "Nash_MTL", {"compile": True}),
    _case("recomputed", "UPGrad", {"encoder_class": partial(Deep, "wrapped")}),
    _case("tables", "MGDA", {"encoder_class": Looking, "optim_param": {"optim": "sgd", "lr": 0.1}}),
    *(_case("in shards", name, SHARDS) for name in FIVE),
    _case("in shards of few rows", "UPGrad", SHARDS, batch=5),
    _case(
        "in odd shards capped", "Nash_MTL", SHARDS | ODD | {"weight_args": {"max_norm": 0.05}, "clip_grad_norm": 0.1}
    ),
    _case("in shards held", "Nash_MTL", SHARDS | {"update_weights_every": 3}),
    _case("in shards recomputed", "UPGrad", SHARDS | {"encoder_class": partial(Deep, "wrapped")}),
]
# The first task does not reach the last layer, and each process has labels of other tasks.
IN_FOUR = [
    *(
        _case(f"in four {way}", name, FORKED | options, batch=12)
        for name in FIVE
        for way, options in (("in blocks", {}), ("in shards", SHARDS))
    ),
    _case("in four at once", "Nash_MTL", FORKED | {"vjps": "sequential"}, batch=12),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """What each of two processes has after each case."""
    return train_in_processes(2, CASES, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """What each of four processes has after each case."""
    return train_in_processes(4, IN_FOUR, tmp_path_factory)


def _at_once(case: Case) -> Case:
    """Return the case in one process, whose groups all wait for all T gradients."""
    options = {name: value for name, value in case.options.items() if name not in ("compile", "shard")}
    return replace(case, options=options | {"vjps": "sequential"})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_train_as_one_with_all_groups_at_once(case: Case, two: Mapping[str, list[Any]]) -> None:
    check_as_one(_at_once(case), two[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_FOUR, ids=lambda case: case.name)
def test_four_processes_train_as_one_with_all_groups_at_once(case: Case, four: Mapping[str, list[Any]]) -> None:
    check_as_one(_at_once(case), four[case.name])


class _Sometimes(Chain):
    """A chain, but in some process and step: what the first layer returns goes round the others then, times zero."""

    rank, bypassed = 0, -1

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh()
        features: Tensor = self.third(self.second(hidden).tanh())
        return features + 0 * hidden if self.bypassed == self.rank else features


def _steps(options: dict[str, Any]) -> tuple[Tensor, list[str], int]:
    """Return parameters and weights after three steps, what was told, and the number of blocks."""
    peers, listener = find_peers(), Listener()
    options = dict(options)
    bypassed, weighting = options.pop("bypassed", -1), options.pop("weighting", "UPGrad")
    trainer: Any = make_trainer(weighting, count=TASKS, logger=listener, **({"groups": "layer"} | options))
    trainer.model.encoder.rank = 0 if peers is None else peers.rank
    batches = loaders(TASKS)
    # Where numbers are drawn, those of the main process count.
    torch.manual_seed(3 + trainer.model.encoder.rank)
    for number, batch in enumerate(batches if peers is None else shard(batches, peers)):
        trainer.model.encoder.bypassed = bypassed if number == 1 else -1
        trainer.step([batch], StepBuffer())
    blocks = getattr(trainer.step.engine.method, "blocks", None)
    trainer.step.comm.unshard()
    ends = [*trainer.model.parameters(), trainer.step.latest.group_weights]
    return flat(ends), listener.messages, 0 if blocks is None else len(blocks.blocks)


def _all_steps(given: list[dict[str, Any]]) -> list[Any]:
    return [_steps(options) for options in given]


SOMETIMES = {"encoder_class": _Sometimes, "vjps": "blockwise"}


@pytest.mark.slow
def test_what_one_process_cannot_none_does(tmp_path: Path) -> None:
    local = {"encoder_class": ENCODER, "gram": "local"}
    given = [
        SOMETIMES,
        SOMETIMES | {"bypassed": 1},
        SOMETIMES | {"bypassed": 0, "weighting": "PCGrad"},
        local,
        local | {"vjps": "blockwise"},
        {"encoder_class": ENCODER, "vjps": "blockwise", "shard": "fsdp"},
        SOMETIMES | {"bypassed": 1, "shard": "fsdp"},
        FORKED | {"vjps": "blockwise", "shard": "fsdp"},
    ]
    wanted = [_steps(options | {"vjps": "sequential", "shard": "none"})[0] for options in given]
    ranks = in_processes(2, tmp_path, _all_steps, given)
    for found in ranks:
        for index in (0, 1, 2, 5, 6, 7):
            torch.testing.assert_close(found[index][0], wanted[index], rtol=1e-9, atol=1e-12)
        assert [blocks for _, _, blocks in found] == [3, 3, 3, 0, 7, 7, 3, 3]
        # The mean of the processes' Gram matrices, and so the update, is the same too.
        torch.testing.assert_close(found[4][0], found[3][0], rtol=1e-9, atol=1e-12)
    # The main process tells.
    told = [messages[-1] for _, messages, _ in ranks[0] if messages]
    assert "3 blocks one after the other" in told[0]
    assert told[1] == "vjps: all groups at once in a step in which another process needs it"
    assert told[2] == "vjps: all groups at once in a step in which the network is no chain of them"
    assert told[-2] == "vjps: all groups at once in a step in which another process needs it"
    assert all("blocks one after the other" in ranks[0][index][1][-1] for index in (4, 5, 7))


WIDTH, DEPTH = 128, 8
BLOCK = WIDTH * WIDTH + WIDTH
SHARED = 6 * WIDTH + WIDTH + (DEPTH - 1) * BLOCK + WIDTH * 8 + 8


def _peaks(ways: list[str]) -> list[int]:
    """Return the elements that a step makes and holds at its peak."""
    peers = find_peers()
    assert peers is not None
    peaks = []
    for way in ways:
        encoder = partial(MLPEncoder, 6, [WIDTH] * DEPTH + [8])
        trainer = make_trainer("MGDA", "HPS", TASKS, encoder_class=encoder, groups="module", vjps=way)
        first, second = list(shard(loaders(TASKS), peers))[:2]
        trainer.step([first], StepBuffer())
        trainer.optimizer.zero_grad()
        with LiveMemory() as live:
            fill_grads(trainer, [second])
        peaks.append(live.peak)
    return peaks


@pytest.mark.slow
def test_pieces_of_one_block_and_one_row_of_the_next_are_held(tmp_path: Path) -> None:
    size, activations = 2, 2 * DEPTH * 4 * WIDTH
    for whole, blocks in in_processes(size, tmp_path, _peaks, ["sequential", "blockwise"]):
        assert whole > (1 + TASKS / size) * SHARED
        # T pieces and the one of the update, and a whole row of the next block.
        assert TASKS / size * BLOCK < blocks <= (TASKS / size + 2) * BLOCK + activations
