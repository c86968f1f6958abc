"""Runs the same training in one process and in several, and brings back the parameters."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.data import DataLoader, default_collate

from fastmtl.architecture.MTAN import MTAN
from fastmtl.distributed import Peers, find_peers, leave, shard
from fastmtl.loss import CELoss, FocalLoss, HuberLoss, MSELoss
from tests.trainer.toy import flat, force_way, loaders, make_trainer, task_dict

TASKS = 3
# Strategies that differ in what processes exchange: losses, Gram matrix, groups of it, rows, random numbers, samples,
# looks ahead and back, own parameters, and what is remembered of each.
DIFFERENT = (
    *("EW", "UW", "FAMO", "DWA", "RLW", "MGDA", "GradVac", "IMTL", "Nash_MTL", "PCGrad", "MoCo", "DB_MTL", "ExcessMTL"),
    *("MoDo", "SDMGrad", "AutoLambda", "FORUM"),
)
# Processes start as copies of one that has imported all this.
multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])


@dataclass(frozen=True)
class Case:
    """A training run of a few steps.

    Attributes:
        name: What it is called in the tests.
        weighting: The strategy.
        batch: Rows of a batch, of which there are 24 in all.
        options: Further arguments of the trainer.
        dtype: What is computed in.
        partial: Labels are missing in some rows, so that some tasks are absent from some parts or whole batches.
    """

    name: str
    weighting: str
    batch: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    partial: bool = False


class Seat(Peers):
    """A place in a group that is never met."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.is_main_process = rank, size, rank == 0


class FixedMTAN(MTAN):
    """MTAN whose batch norms keep their statistics: those of a batch are not those of its parts."""

    def train(self, mode: bool = True) -> FixedMTAN:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


def normed_encoder() -> nn.Module:
    """An encoder with batch norms of both kinds."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False, momentum=None)
    )


def counted_encoder() -> nn.Module:
    """An encoder with a batch norm whose average needs no count of batches, which compilers cannot have."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))


def weighed_tasks() -> dict[str, dict[str, Any]]:
    """Return the tasks with losses that divide by the weights of classes, or by entries."""
    tasks = task_dict(TASKS)
    tasks["task0"]["loss_fn"] = CELoss(weight=[0.1, 1.0, 0.03], label_smoothing=0.1)
    tasks["task1"]["loss_fn"] = HuberLoss(0.5)
    tasks["task2"]["loss_fn"] = FocalLoss(alpha=[0.3, 0.1, 1.0])
    return tasks


class Learned(CELoss):
    """A loss with a layer, as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(3, 3, dtype=torch.float64)

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return super().compute_loss(self.layer(pred), gt)


class Uncertain(MSELoss):
    """A loss with a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return torch.exp(-self.log_variance) * super().compute_loss(pred, gt) + self.log_variance


def learned_tasks() -> dict[str, dict[str, Any]]:
    """Return the tasks with losses that have parameters, one of them the loss of two tasks."""
    tasks = task_dict(TASKS)
    tasks["task0"]["loss_fn"] = tasks["task2"]["loss_fn"] = Learned()
    tasks["task1"]["loss_fn"] = Uncertain()
    return tasks


def grouped() -> dict[str, Any]:
    """Return an optimizer with groups and rates that change with every step."""
    params = {"encoder": {"lr": 3e-3}, "decoders.task1": {"weight_decay": 0.1}}
    return {
        "optim_param": {"optim": "nadam", "lr": 1e-2, "params": params},
        "scheduler_param": {"scheduler": "onecycle", "max_lr": [1e-2, 3e-3, 2e-2]},
    }


def train(case: Case, epochs: int = 3) -> tuple[Tensor, Tensor, list[float]]:
    """Return parameters and losses after the run, and the test scores, of this process's trainer.

    With the parameters come the running statistics of batch norms.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        return _train(case, epochs)
    finally:
        torch.set_default_dtype(before)


def _train(case: Case, epochs: int) -> tuple[Tensor, Tensor, list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        if case.options.get("vjps") == "sketch":
            # What a layer costs depends on the rows in a process.
            force_way(patch, "sketched")
        if case.options.get("compile"):
            # Inductor would take most of the time of all cases, in each process.
            patch.setattr("fastmtl.engine.regions.compile_graph", aot_eager)
        return _trained(case, epochs)


def _trained(case: Case, epochs: int) -> tuple[Tensor, Tensor, list[float]]:
    multi_input = case.options.get("multi_input", False)
    options = deepcopy(case.options)
    trainer = make_trainer(case.weighting, options.pop("architecture", "HPS"), TASKS, **options)
    torch.manual_seed(7)
    # Only the leading process draws tasks.
    peers = find_peers()
    random.seed(7 if peers is None or peers.is_main_process else 8)
    given = loaders(TASKS, batch=case.batch, multi_input=multi_input, shuffle=True, generator=_seeded())
    held_out = loaders(TASKS, rows=10, batch=5, multi_input=multi_input, seed=5)
    if case.partial:
        given.dataset.labels["task0"][::3] = -100
        given.dataset.labels["task1"][[row for row in range(24) if row % 6]] = torch.nan
        given.dataset.labels["task2"][5:] = -100
        given = DataLoader(given.dataset, sampler=given.sampler, batch_size=case.batch, collate_fn=_leave_out)
    if peers is not None:
        given, held_out = shard(given, peers), shard(held_out, peers, whole=True)
    trainer.train(given, held_out, epochs)
    scores = [score for each in trainer.meter.results.values() for score in each]
    statistics = [value for name, value in trainer.model.named_buffers() if "running_" in name]
    return flat([*trainer.model.parameters(), *statistics]), torch.tensor(trainer.meter.loss_item), scores


def _leave_out(rows: list[Any]) -> Any:
    """Return a batch without the tasks that have no label in it."""
    inputs, labels = default_collate(rows)
    return inputs, {task: each for task, each in labels.items() if (each.isfinite() & (each != -100)).any()}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _member(rank: int, size: int, folder: str, work: Any, given: Any) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    done = False
    try:
        torch.save(work(given), f"{folder}/{rank}.pt")
        done = True
    finally:
        leave(wait=done)
    # See fastmtl/__main__.py.
    sys.stdout.flush()
    os._exit(0)


def in_processes(size: int, folder: Path, work: Any, given: Any) -> list[Any]:
    """Return what ``work(given)`` returns in each of ``size`` processes; both must be picklable."""
    # A folder for each call: in one that has been used, processes may read where those of the call before have met.
    folder = Path(tempfile.mkdtemp(dir=folder))
    mp.start_processes(_member, (size, str(folder), work, given), nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def train_all(cases: Sequence[Case]) -> list[Any]:
    """Return what :func:`train` returns of each case."""
    return [train(case) for case in cases]


def train_in_processes(size: int, cases: Sequence[Case], folders: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """Return what each of ``size`` processes has after each case, by the case's name."""
    ranks = in_processes(size, folders.mktemp("run"), train_all, cases)
    return {case.name: [rank[index] for rank in ranks] for index, case in enumerate(cases)}


def check_as_one(case: Case, ranks: Sequence[Any]) -> None:
    """Check what :func:`train` has returned in each of several processes against one process."""
    params, losses, scores = train(case)
    close = 1e-9 if case.dtype == torch.float64 else 1e-4
    for of_rank, losses_of_rank, scores_of_rank in ranks:
        assert (of_rank - params).norm() <= close * params.norm()
        assert torch.allclose(losses_of_rank, losses, rtol=close)
        assert scores_of_rank == pytest.approx(scores, rel=close)
    assert all(torch.equal(each[0], ranks[0][0]) for each in ranks)
