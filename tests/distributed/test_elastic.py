"""A run that is ended within an epoch goes on with another number of processes, which have the same batches."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastmtl.distributed import find_peers, shard
from fastmtl.errors import CheckpointError
from fastmtl.trainer.checkpoint.epochs import is_random
from tests.distributed.group import TASKS, Case, in_processes
from tests.distributed.recomputing import Deep
from tests.trainer.grouped import Chain
from tests.trainer.toy import flat, loaders, make_trainer

pytestmark = pytest.mark.usefixtures("in_float64")

ADAM = {"optim_param": {"optim": "adam", "lr": 1e-2}}
CASES = [
    Case("MGDA", "MGDA", options=ADAM),
    # It reads the losses of whole epochs.
    Case("DWA", "DWA"),
    Case("state of rows", "MoCo"),
    Case("random weights", "RLW"),
    Case("accumulate", "UPGrad", batch=4, options={"accumulate": 2}),
    Case("tasks per step", "PCGrad", options={"tasks_per_step": 2}),
    Case("of each task", "PCGrad", options={"multi_input": True}),
    Case("shards", "DB_MTL", options={"shard": "fsdp", **ADAM}),
    Case("blocks", "Nash_MTL", options={"groups": "module", "vjps": "blockwise", "encoder_class": Chain}),
    Case("recomputed", "MGDA", options={"shard": "fsdp", "encoder_class": partial(Deep, "both", dropout=nn.Identity)}),
]
IN_FOUR = [case for case in CASES if case.name in ("MGDA", "state of rows", "shards")]
EPOCHS, ROWS = 5, 40


class Ended(Exception):
    """What ends a run before a step, in all of its processes."""


def _loaders(case: Case, rows: int = ROWS) -> Any:
    # One generator for each loader, as of loaders that are made apart.
    given = loaders(TASKS, rows, case.batch, multi_input=case.options.get("multi_input", False), shuffle=True)
    each = given if isinstance(given, dict) else {"": given}
    made = {
        task: DataLoader(loader.dataset, case.batch, shuffle=True, generator=torch.Generator().manual_seed(3))
        for task, loader in each.items()
    }
    return made if isinstance(given, dict) else made[""]


def _trained(case: Case, folder: str | None, ends: bool, data: Any = None) -> tuple[Tensor, Any]:
    """Return parameters and the epochs' losses; those of a run that ends in its third epoch are not whole."""
    peers = find_peers()
    # Only the leading process draws tasks and weights.
    seed = 7 if peers is None or peers.is_main_process else 8
    random.seed(seed)
    place = {} if folder is None else {"save_path": folder} if ends else {"resume": folder}
    trainer = make_trainer(case.weighting, "HPS", TASKS, **case.options, **place, checkpoint_every=2)
    torch.manual_seed(seed)
    data = _loaders(case) if data is None else data
    held_out = loaders(TASKS, rows=10, batch=5, multi_input=case.options.get("multi_input", False), seed=5)
    if peers is not None:
        data, held_out = shard(data, peers), shard(held_out, peers, whole=True)
    if ends:
        save = trainer.checkpoints.save_last

        def save_and_end(epoch: int, batch: int, **options: Any) -> None:
            save(epoch, batch, **options)
            if (epoch, batch) == (3, 2):
                raise Ended

        trainer.checkpoints.save_last = save_and_end  # type: ignore[method-assign]
        with pytest.raises(Ended):
            trainer.train(data, held_out, EPOCHS)
    else:
        trainer.train(data, held_out, EPOCHS)
    trainer.step.comm.unshard()
    return flat(trainer.model.parameters()), trainer.model.train_loss_buffer.tolist()


def _all_trained(given: tuple[str, bool, list[Case]]) -> list[Any]:
    folder, ends, cases = given
    found = []
    for case in cases:
        (Path(folder) / case.name).mkdir(exist_ok=True)
        found.append(_trained(case, str(Path(folder) / case.name), ends))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "cases"),
    [(2, 1, CASES), (2, 4, IN_FOUR), (1, 2, CASES[:2])],
    ids=["2 to 1", "2 to 4", "1 to 2"],
)
def test_a_run_goes_on_with_other_processes(tmp_path: Path, before: int, after: int, cases: list[Case]) -> None:
    def run(size: int, ends: bool) -> list[Any]:
        given = (str(tmp_path), ends, cases)
        return [_all_trained(given)] if size == 1 else in_processes(size, tmp_path, _all_trained, given)

    run(before, True)
    ranks = run(after, False)
    for index, case in enumerate(cases):
        wanted, losses = _trained(case, None, False)
        for rank in ranks:
            params, losses_of_rank = rank[index]
            assert (params - wanted).norm() <= 1e-9 * wanted.norm(), case.name
            torch.testing.assert_close(torch.tensor(losses_of_rank), torch.tensor(losses), rtol=1e-9, atol=0)


class Noisy(Dataset[Any]):
    """Rows that are changed at random, from torch's generator or one of their own."""

    def __init__(self, rows: Any, generator: torch.Generator | None) -> None:
        self.rows = rows
        self.generator = generator

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        inputs, labels = self.rows[index]
        return inputs + torch.randn(inputs.shape, generator=self.generator), labels


def _noisy(generator: torch.Generator | None) -> Any:
    return DataLoader(Noisy(loaders(TASKS, ROWS).dataset, generator), 8, shuffle=True)


def _ended(folder: Path, **changed: Any) -> None:
    """Leave a checkpoint within an epoch in a folder, as if other processes had written it."""
    _trained(CASES[0], str(folder), True)
    state = torch.load(folder / "last.pt", weights_only=True)
    state["data"] |= changed
    torch.save(state, folder / "last.pt")


def test_rows_that_are_changed_at_random_go_on_with_as_many_processes_alone(tmp_path: Path) -> None:
    _ended(tmp_path, processes=2, divided=True)
    before = torch.get_rng_state()
    assert not is_random(_loaders(CASES[0]))
    for generator in (None, torch.Generator()):
        with pytest.raises(CheckpointError, match="cannot go on with 1 processes in place of 2 where rows are changed"):
            _trained(CASES[0], str(tmp_path), False, _noisy(generator))
    assert is_random(_noisy(None))
    torch.set_rng_state(before)
    assert is_random(_noisy(torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)
    # They do go on with as many.
    _ended(tmp_path)
    _trained(CASES[0], str(tmp_path), False, _noisy(None))


def test_an_epoch_goes_on_with_its_batches_alone(tmp_path: Path) -> None:
    _ended(tmp_path)
    with pytest.raises(CheckpointError, match="its batches have 8 rows in the checkpoint, 4 in this run, over all 1"):
        _trained(replace(CASES[0], batch=4), str(tmp_path), False)
    with pytest.raises(CheckpointError, match="its epochs have 5 batches in the checkpoint, 6 in this run"):
        _trained(CASES[0], str(tmp_path), False, _loaders(CASES[0], 48))
    _ended(tmp_path, processes=2)
    with pytest.raises(CheckpointError, match=r"only if fastmtl\.distributed\.shard divides the batches"):
        _trained(CASES[0], str(tmp_path), False)
