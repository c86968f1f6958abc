"""Trainers of three tasks in float64, and networks, for the tests of groups of parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.weighting import AbsWeighting, Weights
from tests.trainer.toy import loaders, make_trainer

__all__ = ["TASKS", "Blocks", "Chain", "Counts", "Forked", "batches_of", "double_trainer"]

TASKS = 3


def double_trainer(weighting: Any, **options: Any) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return make_trainer(weighting, count=TASKS, **({"groups": "layer"} | options))
    finally:
        torch.set_default_dtype(torch.float32)


def batches_of(trainer: Any) -> list[Any]:
    """Batches in float64, as many as a step takes."""
    given = list(loaders(TASKS, rows=8 * trainer.step.batches))
    return [
        (inputs.double(), {task: y.double() if y.is_floating_point() else y for task, y in labels.items()})
        for inputs, labels in given
    ]


class Counts(AbsWeighting):
    """A rule of a user's that knows nothing of groups."""

    needs = "gram"
    seen: Tensor

    def init_param(self) -> None:
        self.remember("seen", torch.zeros(self.task_num, dtype=torch.float64))

    def weigh(self, losses: Tensor, gram: Tensor, **hyper: Any) -> Weights:
        assert gram.shape == (TASKS, TASKS)
        self.seen = self.seen + gram.diagonal()
        return Weights(shared=self.seen / self.seen.sum())


class Blocks(nn.Module):
    """Layers in blocks, and a parameter beside them."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(6))
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))
        self.last = nn.TransformerEncoderLayer(8, 2, 8, dropout, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs + self.token)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.last(hidden[:, None])[:, 0]


class Chain(nn.Module):
    """A chain of three layers, of which the second may be used more than once."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = again

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).relu_()
        if self.again:
            hidden = hidden + self.second(self.second(hidden))
        middle = self.second(hidden).tanh()
        return self.third(middle) + hidden


class Forked(Chain):
    """Features of each task, of two depths: the first task does not reach the last layer."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        middle = self.second(self.first(inputs).tanh()).tanh()
        return middle, *[self.third(middle)] * (TASKS - 1)
