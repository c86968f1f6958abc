"""Runs with torchdata's StatefulDataLoader go on within an epoch where they were, and load no batch twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from fastmtl.distributed import shard
from fastmtl.errors import CheckpointError, UsageError
from tests.distributed.group import Seat
from tests.trainer.test_resume import OPTIONS, InterruptAt
from tests.trainer.toy import flat, loaders, make_trainer

EPOCHS = 3


class Rows(Dataset[Any]):
    """Rows with noise, which is drawn from a generator of its own, or from torch's.

    Attributes:
        reads: How many rows were read in this process.
        noise: The generator of the noise, None for torch's, False for no noise.
    """

    def __init__(self, rows: Any, noise: Any = False) -> None:
        self.rows = rows
        self.noise = noise
        self.reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        inputs, labels = self.rows[index]
        noise = 0 if self.noise is False else torch.randn(inputs.shape, generator=self.noise)
        return inputs + noise, labels


class Remembering(Rows):
    """Rows whose noise is part of the state, as torchdata asks of data sets that draw random numbers in workers."""

    def state_dict(self) -> dict[str, Any]:
        return {"noise": self.noise.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.noise.set_state(state["noise"])


def _loader(rows: Any, workers: int = 0, **options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    given = {"batch_size": 8, "shuffle": True, **options}
    return StatefulDataLoader(rows, num_workers=workers, **given)


def _rows(count: int = 40, task: str | None = None) -> Any:
    given = loaders(rows=count, multi_input=task is not None)
    return given.dataset if task is None else given[task].dataset


def _own_sampler(workers: int) -> Any:
    rows = _rows()
    sampler = BatchSampler(RandomSampler(rows), 8, drop_last=False)
    return _loader(rows, workers, batch_size=1, shuffle=False, batch_sampler=sampler)


class _ByHand:
    """A batch sampler of one's own, which draws its order late."""

    def __iter__(self) -> Any:
        yield from torch.randperm(40).view(5, 8).tolist()

    def __len__(self) -> int:
        return 5


CASES: dict[str, Any] = {
    "plain": (lambda workers: _loader(_rows(), workers), {}),
    "generator": (lambda workers: _loader(_rows(), workers, generator=torch.Generator().manual_seed(7)), {}),
    "in order": (lambda workers: _loader(_rows(), workers, shuffle=False), {}),
    "persistent": (lambda workers: _loader(_rows(), workers, persistent_workers=workers > 0), {}),
    "rare snapshots": (lambda workers: _loader(_rows(), workers, snapshot_every_n_steps=3), {}),
    "sampler": (_own_sampler, {}),
    "by hand": (lambda workers: _loader(_rows(), workers, batch_size=1, shuffle=False, batch_sampler=_ByHand()), {}),
    "accumulate": (lambda workers: _loader(_rows(), workers, batch_size=4), {"accumulate": 2}),
    "limit": (lambda workers: _loader(_rows(96), workers, persistent_workers=workers > 0), {"limit_batches": 5}),
    "samples": (lambda workers: _loader(_rows(), workers, batch_size=2), {"weighting": "MoDo"}),
    "state of rows": (lambda workers: _loader(Remembering(_rows(), torch.Generator().manual_seed(1)), workers), {}),
    # The second loader starts again after one and after two batches.
    "of each task": (
        lambda workers: {"task0": _loader(_rows(40, "task0"), workers), "task1": _loader(_rows(16, "task1"), workers)},
        {"multi_input": True},
    ),
}
CASES["dealt out"] = (lambda workers: shard(_loader(_rows(), workers), Seat(0, 2)), {})


def _trained(make: Any, workers: int, options: dict[str, Any], given: Any = None, **more: Any) -> Tensor:
    torch.manual_seed(5)
    given = make(workers) if given is None else given
    trainer = make_trainer(**OPTIONS | options | more)
    trainer.train(given, loaders(multi_input=options.get("multi_input", False)), EPOCHS)
    return flat(trainer.model.parameters())


def _check(make: Any, workers: int, options: dict[str, Any], step: int, folder: Path) -> None:
    wanted = _trained(make, workers, options)
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        _trained(make, workers, options, save_path=str(folder), logger=InterruptAt(step))
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["batch"] > 0
    assert torch.equal(_trained(make, workers, options, resume=str(folder)), wanted)


@pytest.mark.parametrize("name", CASES)
def test_without_workers(name: str, tmp_path: Path) -> None:
    make, options = CASES[name]
    for step in (1, 5, 6, 8):
        _check(make, 0, options, step, tmp_path / str(step))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_with_workers(name: str, tmp_path: Path) -> None:
    make, options = CASES[name]
    _check(make, 2, options, 7, tmp_path / "run")


def test_random_rows_without_workers(tmp_path: Path) -> None:
    _check(lambda workers: _loader(Rows(_rows(), None), workers), 0, {}, 6, tmp_path / "run")


def test_no_batch_is_loaded_again(tmp_path: Path) -> None:
    def make(workers: int) -> Any:
        return _loader(Rows(_rows()), workers)

    with pytest.raises(KeyboardInterrupt):
        _trained(make, 0, {}, save_path=str(tmp_path), logger=InterruptAt(12))
    # Step 12 of 0 .. 14 was the last.
    torch.manual_seed(5)
    given = make(0)
    _trained(make, 0, {}, given, resume=str(tmp_path))
    assert given.dataset.reads == 2 * 8


def test_a_run_that_went_on_goes_on_again(tmp_path: Path) -> None:
    make, options = CASES["plain"]
    wanted = _trained(make, 0, options)
    for step, more in ((6, {}), (8, {"resume": str(tmp_path)})):
        with pytest.raises(KeyboardInterrupt):
            _trained(make, 0, options, save_path=str(tmp_path), logger=InterruptAt(step), **more)
    assert torch.equal(_trained(make, 0, options, resume=str(tmp_path)), wanted)


def _plain(workers: int) -> Any:
    return DataLoader(_rows(), 8, shuffle=True, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("first", "then"), [(CASES["generator"][0], _plain), (_plain, CASES["generator"][0])])
def test_loaders_that_draw_another_order_are_refused(first: Any, then: Any, tmp_path: Path) -> None:
    """Of equal generators, DataLoader and StatefulDataLoader draw different orders."""
    with pytest.raises(KeyboardInterrupt):
        _trained(first, 0, {}, save_path=str(tmp_path), logger=InterruptAt(6))
    with pytest.raises(CheckpointError, match="would give the epoch's rows in another order"):
        _trained(then, 0, {}, resume=str(tmp_path))


@pytest.mark.slow
def test_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    make, _ = CASES["plain"]
    with pytest.raises(KeyboardInterrupt):
        _trained(make, 2, {}, save_path=str(tmp_path), logger=InterruptAt(6))
    for workers in (0, 1):
        with pytest.raises(CheckpointError, match="with as many workers: StatefulDataLoader does not take up"):
            _trained(make, workers, {}, resume=str(tmp_path))


class _OfNumpy(Rows):
    def state_dict(self) -> dict[str, Any]:
        return {"noise": np.zeros(2)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def test_states_that_no_checkpoint_can_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"state_dict of train_dataloaders must return tensors .* got ndarray"):
        _trained(lambda _: _loader(_OfNumpy(_rows())), 0, {}, save_path=str(tmp_path), checkpoint_every=2)
