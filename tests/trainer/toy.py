"""A small training problem: two or more tasks on vectors, exact and quick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastmtl import Trainer
from fastmtl.engine import comm
from fastmtl.engine.context import Batch
from fastmtl.engine.engine import LossEngine
from fastmtl.engine.halving import Halving, Pair
from fastmtl.engine.layerwise import plan, sketches, vjps
from fastmtl.engine.methods import base, split
from fastmtl.engine.methods.base import Method
from fastmtl.engine.vjp import vjp
from fastmtl.loss import BCELoss, CELoss, MSELoss
from fastmtl.metrics import AccMetric, L1Metric
from fastmtl.model import MLPEncoder
from fastmtl.trainer.log.logger import Logger
from fastmtl.trainer.tasks import step_tasks
from fastmtl.weighting import WEIGHTINGS

__all__ = [
    "Listener",
    "batch_of",
    "count_vjps",
    "encoder",
    "fill_grads",
    "flat",
    "force_way",
    "loaders",
    "make_trainer",
    "method_of",
    "steps_of",
    "task_dict",
]


def encoder() -> nn.Module:
    return MLPEncoder(6, [8, 8])


def task_dict(count: int = 2) -> dict[str, dict[str, Any]]:
    """Classification and regression in turn."""
    found = {}
    for index in range(count):
        kind: dict[str, Any] = {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]}
        if index % 2:
            kind = {"metrics": ["L1"], "metrics_fn": L1Metric(), "loss_fn": MSELoss(), "weight": [0]}
        found[f"task{index}"] = kind
    return found


class _OfSigns(BCELoss):
    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return super().compute_loss(pred, (gt > 0).to(pred.dtype))


def steps_of(count: int) -> dict[str, Any]:
    """Tasks and decoders of logits, as an architecture takes them whose tasks are steps of one sequence."""
    kind = {"metrics": ["L1"], "weight": [0]}
    tasks = {f"task{t}": {**kind, "metrics_fn": L1Metric(), "loss_fn": _OfSigns()} for t in range(count)}
    return {"task_dict": tasks, "decoders": nn.ModuleDict({task: nn.Linear(8, 1) for task in tasks})}


class _Labelled(TensorDataset):
    def __init__(self, count: int, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, 6, generator=generator)
        mix = torch.randn(6, 3, generator=torch.Generator().manual_seed(99))
        self.labels = {
            f"task{t}": (self.x @ mix)[:, :1].clone() if t % 2 else (self.x @ mix).argmax(1) for t in range(count)
        }
        super().__init__(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], {task: label[index] for task, label in self.labels.items()}


class _OneTask(TensorDataset):
    def __init__(self, whole: _Labelled, task: str) -> None:
        super().__init__(whole.x, whole.labels[task])


def loaders(
    count: int = 2,
    rows: int = 24,
    batch: int = 8,
    *,
    multi_input: bool = False,
    shuffle: bool = False,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> Any:
    """A loader, or one for each task; their rows differ if multi-input."""
    options: dict[str, Any] = {"batch_size": batch, "shuffle": shuffle and rows > 0, "generator": generator}
    if not multi_input:
        return DataLoader(_Labelled(count, rows, seed), **options)
    return {
        f"task{t}": DataLoader(_OneTask(_Labelled(count, rows, seed + t), f"task{t}"), **options) for t in range(count)
    }


class Listener(Logger):
    """Keeps what a trainer tells of compilations and of ways it cannot go."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_compile(self, message: str) -> None:
        """Keep a message."""
        self.messages.append(message)


def make_trainer(
    weighting: Any = "MGDA",
    architecture: Any = "HPS",
    count: int = 2,
    trainer_class: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    torch.manual_seed(0)
    given = {
        "task_dict": task_dict(count),
        "encoder_class": encoder,
        "decoders": nn.ModuleDict({f"task{t}": nn.Linear(8, 1 if t % 2 else 3) for t in range(count)}),
        "rep_grad": False,
        "multi_input": False,
        "optim_param": {"optim": "sgd", "lr": 0.05, "momentum": 0.9},
        "scheduler_param": None,
        "device": "cpu",
    }
    if getattr(WEIGHTINGS.get(weighting) if isinstance(weighting, str) else weighting, "steers_adam", False):
        tasks = len(options.get("task_dict", given["task_dict"]))
        given |= {"optim_param": {"optim": "adam", "lr": 0.01}, "tasks_per_step": tasks}
    given.update(options)
    return trainer_class(weighting=weighting, architecture=architecture, **given)


def halves(batch: Pair) -> tuple[Pair, Pair]:
    """Return the halves of the inputs and labels that all tasks share."""
    return Halving()(*batch)


def batch_of(trainer: Trainer, inputs: Any, labels: Any) -> Batch:
    """Return a batch of all tasks as the engine takes it."""
    return Batch(inputs=inputs, labels=labels, tasks=tuple(trainer.task_name))


def method_of(trainer: Trainer) -> Method | None:
    """Return how the tasks' gradients are computed; None of a strategy that has one backward pass for all losses."""
    engine: Any = trainer.step.engine
    if isinstance(engine, LossEngine):
        return None
    found: Method = engine.method
    return found


def fill_grads(trainer: Trainer, batches: Sequence[tuple[Any, Any]]) -> None:
    """Fill all ``.grad`` as a step of all tasks does, which then moves nothing."""
    step, names = trainer.step, trainer.task_name
    step._gradients(step._context(batches, step_tasks(list(range(len(names))), names)), step.weights)


def count_vjps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every backward pass of the methods and of what comes after them."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return vjp(*args, **kwargs)

    for module in (comm, base, split):
        assert module.vjp is vjp
        monkeypatch.setattr(module, "vjp", counted)
    return calls


def force_way(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Let every layer go a way, whatever it costs and however far a sketch is off."""
    real = plan.layer_of

    def layer_of(*args: Any) -> plan.Layer:
        return replace(real(*args), costs={"direct": 1.0, way: 0.0})

    monkeypatch.setattr(vjps, "layer_of", layer_of)
    monkeypatch.setattr(sketches, "LARGEST_ERROR", math.inf)


def flat(params: Any) -> Tensor:
    return torch.cat([param.detach().flatten() for param in params])
