"""Sharing loaders, refusals, and the local Gram matrix."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl import Trainer
from fastmtl.distributed import Peers, find_peers, join, shard
from fastmtl.errors import UsageError
from fastmtl.metrics import AbsMetric, NormalMetric
from fastmtl.trainer.log.records import StepBuffer
from tests.distributed.group import TASKS, Seat, grouped, in_processes
from tests.distributed.looking import Looking
from tests.trainer.toy import encoder, flat, loaders, make_trainer


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(24, 2), (26, 3), (25, 3), (7, 4)])
def test_parts_of_batches_make_the_batches(rows: int, size: int, whole: bool) -> None:
    given = loaders(rows=rows, batch=6, shuffle=True, generator=torch.Generator().manual_seed(0))
    wanted = [sorted(x[:, 0].tolist()) for x, _ in given]
    found: list[list[float]] = [[] for _ in wanted]
    for rank in range(size):
        given.generator.manual_seed(0)
        mine = shard(given, Seat(rank, size), whole=whole)
        parts = [x[:, 0].tolist() for x, _ in mine]
        assert len(parts) == len(mine)
        for all_rows, part in zip(found, parts, strict=False):
            all_rows += part
    kept = [batch for batch in wanted if whole or len(batch) >= size]
    assert [sorted(batch) for batch in found if batch] == kept


def test_batches_smaller_than_the_group_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 9, the number of processes, got 8"):
        shard(loaders(), Seat(0, 9))


def test_alone_there_are_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() is None
    assert find_peers() is None


def test_unknown_choices_are_refused() -> None:
    for option in ("gram", "shard"):
        with pytest.raises(UsageError, match=option):
            make_trainer(**{option: "lokal"})


class _Listed(AbsMetric):
    def update_fun(self, pred: Any, gt: Any) -> None:
        self.record.append(pred.sum())
        self.bs.append(len(pred))

    def score_fun(self) -> list[float]:
        return [float(sum(self.record)), sum(self.bs)]


def _on_mesh() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    return distribute_module(encoder(), init_device_mesh("cpu", (2,)))


def _turned() -> nn.Module:
    found = nn.Linear(6, 8)
    found.weight = nn.Parameter(found.weight.detach().T.contiguous().T)
    return found


def _left_alone(weighting: str, peers: Peers) -> bool:
    """Return whether shards stay as they are when one process sees a NaN, and move when none does."""
    trainer = make_trainer(weighting, "HPS", TASKS, shard="fsdp")
    assert trainer.storage.is_sharded
    first, second = list(shard(loaders(TASKS), peers))[:2]
    states = [flat(trainer.storage.trained)]
    trainer.step([first], StepBuffer())
    states.append(flat(trainer.storage.trained))
    inputs, labels = second
    trainer.step([(inputs * torch.nan if peers.is_main_process else inputs, labels)], StepBuffer())
    states.append(flat(trainer.storage.trained))
    return not torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])


def _frozen_stays(weighting: str, peers: Peers) -> bool:
    """Return whether a parameter that is frozen after a step stays as it is, whatever is remembered of it."""
    trainer = make_trainer(weighting, "HPS", TASKS)
    first, second = list(shard(loaders(TASKS), peers))[:2]
    trainer.step([first], StepBuffer())
    param = next(trainer.model.encoder.parameters()).requires_grad_(False)
    param.grad, kept = None, param.clone()
    trainer.step([second], StepBuffer())
    return torch.equal(param, kept)


class _Late(nn.Module):
    """A layer more once it is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.deep = encoder(), nn.Linear(8, 8), False

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.first(inputs)
        return self.late(found) if self.deep else found


def _meet_late(weighting: str) -> str:
    peers = find_peers()
    assert peers is not None
    trainer = make_trainer(weighting, "HPS", TASKS, encoder_class=_Late)
    first, second = list(shard(loaders(TASKS), peers))[:2]
    trainer.step([first], StepBuffer())
    network: Any = trainer.model.encoder
    network.deep = True
    with pytest.raises(UsageError) as caught:
        trainer.step([second], StepBuffer())
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["MGDA", "EW"])
def test_a_gradient_that_comes_late_is_not_left_out_in_silence(weighting: str, tmp_path: Path) -> None:
    for message in in_processes(2, tmp_path, _meet_late, weighting):
        assert "A parameter of shape (8, 8) has a gradient, but had none in the first step" in message


def _meet(_: None) -> dict[str, Any]:
    peers = find_peers()
    assert peers is not None
    found: dict[str, Any] = {"refused": []}
    options: dict[str, dict[str, Any]] = {"MoCo": {"gram": "local"}, "MGDA": {"cuda_graph": True}}
    for weighting, more in options.items():
        with pytest.raises(UsageError) as caught:
            make_trainer(weighting, **more)
        found["refused"].append(str(caught.value))
    with pytest.raises(UsageError) as caught:
        make_trainer("EW", encoder_class=_on_mesh)
    found["refused"].append(str(caught.value))
    found["unsharded"] = []
    for together in ({"gram": "local"},):
        with pytest.raises(UsageError) as caught:
            make_trainer("MGDA", shard="fsdp", **together)
        found["unsharded"].append(str(caught.value))
    with pytest.raises(UsageError, match="needs contiguous parameters"):
        make_trainer("MGDA", shard="fsdp", encoder_class=_turned)
    found["masked"] = [_left_alone(weighting, peers) for weighting in ("MGDA", "EW")]
    found["frozen"] = [_frozen_stays(weighting, peers) for weighting in ("MGDA", "MoCo", "EW")]
    trainer = make_trainer("MGDA", "HPS", TASKS, gram="local")
    buffer = StepBuffer()
    trainer.step([next(iter(shard(loaders(TASKS), peers)))], buffer)
    found["gram"] = torch.as_tensor(buffer.flush(0, 1).gram)[0]
    listed, normals = _Listed(), NormalMetric()
    listed.update_fun(torch.full((2,), float(peers.rank)), None)
    if peers.is_main_process:
        normals.update_fun(torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1) / 3**0.5)
    for metric in (listed, normals):
        metric.sync(peers)
    found["scores"] = [listed.score_fun(), normals.score_fun()[2:]]
    ahead = make_trainer("FORUM", "HPS", TASKS)
    ahead.train(shard(loaders(TASKS, rows=6, batch=3), peers), shard(loaders(TASKS), peers, whole=True), 1)
    found["one row"] = flat(ahead.model.parameters())
    found["bf16"] = _run(make_trainer("Nash_MTL", "HPS", TASKS, precision="bf16"), peers, 1).model.state_dict()
    with pytest.raises(UsageError, match="same length"):
        trainer.train(loaders(TASKS, rows=8 + 8 * peers.rank), loaders(TASKS))
    return found


def test_two_processes_meet(tmp_path: Path) -> None:
    one, two = in_processes(2, tmp_path, _meet, None)
    assert all("Several processes cannot train with" in sentence for sentence in one["refused"])
    assert all("shard='fsdp' cannot be combined with" in sentence for sentence in one["unsharded"])
    for found in (one, two):
        assert found["masked"] == [True, True]
        assert found["frozen"] == [True, True, True]
        assert found["scores"] == [[2.0, 4], [1.0, 1.0, 1.0]]
    assert one["one row"].isfinite().all()
    assert torch.equal(one["one row"], two["one row"])
    for name, value in one["bf16"].items():
        assert value.isfinite().all()
        assert torch.equal(two["bf16"][name], value)
    torch.set_default_dtype(torch.float64)
    try:
        inputs, labels = next(iter(loaders(TASKS)))
        halves = []
        for rank in range(2):
            buffer = StepBuffer()
            part = inputs[rank::2], {task: label[rank::2] for task, label in labels.items()}
            make_trainer("MGDA", "HPS", TASKS).step([part], buffer)
            halves.append(torch.as_tensor(buffer.flush(0, 1).gram)[0])
    finally:
        torch.set_default_dtype(torch.float32)
    for found in (one, two):
        assert torch.allclose(found["gram"], sum(halves) / 2, rtol=1e-9)


ADAM = {"optim_param": {"optim": "adam", "lr": 1e-2}}
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "Nash_MTL": ("Nash_MTL", {}),
    "tables": ("UPGrad", {"encoder_class": Looking, "optim_param": {"optim": "sparseadam", "lr": 1e-2}}),
    "MoCo": ("MoCo", {}),
    "ExcessMTL": ("ExcessMTL", {}),
    "shards": ("MGDA", {"shard": "fsdp", **ADAM}),
    "shards of rows": ("DB_MTL", {"shard": "fsdp"}),
    "shards of one task's row": ("MConFIG", {"shard": "fsdp", "tasks_per_step": 1}),
    "shards and own parameters": ("UW", {"shard": "fsdp", **ADAM}),
    "shards of groups": ("MGDA", {"shard": "fsdp", **grouped(), "scheduler_param": {"scheduler": "exp", "gamma": 0.9}}),
}


def _train_half(folder: str) -> None:
    peers = find_peers()
    assert peers is not None
    for name, (weighting, options) in RESUMED.items():
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        random.seed(7)
        _run(make_trainer(weighting, "HPS", TASKS, save_path=str(place), **options), peers, 2)


def _train_on(folder: str) -> list[Any]:
    peers = find_peers()
    found = []
    for name, (weighting, options) in RESUMED.items():
        resumed = make_trainer(weighting, "HPS", TASKS, resume=f"{folder}/{name}/last.pt", **options)
        found.append(flat(_run(resumed, peers, 4).model.parameters()))
    return found


def _run(trainer: Trainer, peers: Peers | None, epochs: int) -> Trainer:
    generator = torch.Generator().manual_seed(3)
    given = loaders(TASKS, batch=6, shuffle=True, generator=generator)
    held_out = loaders(TASKS, rows=10, seed=5)
    if peers is not None:
        given, held_out = shard(given, peers), shard(held_out, peers, whole=True)
    trainer.train(given, held_out, epochs)
    return trainer


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    torch.set_default_dtype(torch.float64)
    try:
        wanted = []
        for name, (weighting, options) in RESUMED.items():
            (one / name).mkdir()
            random.seed(7)
            _run(make_trainer(weighting, "HPS", TASKS, save_path=str(one / name), **options), None, 2)
            random.seed(7)
            wanted.append(flat(_run(make_trainer(weighting, "HPS", TASKS, **options), None, 4).model.parameters()))
        in_processes(2, two, _train_half, str(two))
        resumed = [_train_on(str(two)), *in_processes(2, one, _train_on, str(one))]
    finally:
        torch.set_default_dtype(torch.float32)
    for name in RESUMED:
        alone, shared = (torch.load(folder / name / "best.pt") for folder in (one, two))
        assert {key: value.shape for key, value in alone.items()} == {key: v.shape for key, v in shared.items()}
    for found in resumed:
        for params, other in zip(found, wanted, strict=True):
            assert (params - other).norm() <= 1e-9 * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", " --shard fsdp"], ids=["whole", "shards"])
def test_the_command_in_two_processes(tmp_path: Path, more: str) -> None:
    options = (
        "--weighting mgda --encoder conv --train-size 64 --batch-size 16 --test-batch-size 16 --limit-batches 2 "
        "--device cpu --no-plot --no-tensorboard"
    )
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launched, "-m", "fastmtl", "train", *(options + more).split(), "--run-dir", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Epoch: 0000 | TRAIN:") == 1
    assert {"best.pt", "last.pt", "config.yaml", "metrics.jsonl"} <= {
        file.name for file in (tmp_path / "run").iterdir()
    }
