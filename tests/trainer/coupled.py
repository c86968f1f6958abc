"""Two tasks whose predictions depend on each other, in the ways that programs have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import Trainer
from fastmtl.architecture import HPS
from fastmtl.loss import AbsLoss, MSELoss
from fastmtl.metrics import L1Metric
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.toy import encoder, make_trainer

TASKS = ("ctr", "ctcvr")
Batch = tuple[Tensor, dict[str, Tensor]]


class _Product(Trainer):
    """The second task's prediction is the product of both."""

    def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
        first, second = (preds[task].sigmoid() for task in TASKS)
        return {"ctr": first, "ctcvr": first * second}


class _Keeping(nn.Module):
    """Keeps its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, features: Tensor) -> Tensor:
        self.last: Tensor = self.layer(features).sigmoid()
        return self.last


class _OfOther(nn.Module):
    """Multiplies by what another decoder, which this one does not own, has returned."""

    def __init__(self, other: _Keeping) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)
        self.others = [other]

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.layer(features).sigmoid() * self.others[0].last
        return result


class _Calling(nn.Module):
    """Runs another decoder on its own features."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(8, 1), other

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.layer(features).sigmoid() * self.other(features)
        return result


class _WithOther(AbsLoss):
    """Multiplies the prediction by that of another decoder."""

    def __init__(self, other: _Keeping) -> None:
        super().__init__()
        self.other = other

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return (pred.sigmoid() * self.other.last - gt).square().mean()


class _OnePiece(HPS):
    """An architecture with a forward of its own."""

    def forward(self, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        features = self.encoder(inputs)
        first, second = (
            self.decoders[task](self._prepare_rep(features, task, same_rep=True)).sigmoid() for task in TASKS
        )
        return {"ctr": first, "ctcvr": first * second}


def tasks(first: AbsLoss, second: AbsLoss) -> dict[str, dict[str, Any]]:
    """Two regressions with their losses."""
    return {
        task: {"metrics": ["L1"], "metrics_fn": L1Metric(), "loss_fn": loss, "weight": [0]}
        for task, loss in zip(TASKS, (first, second), strict=True)
    }


def coupled_trainer(weighting: str, kind: str, **options: Any) -> Trainer:
    torch.manual_seed(0)
    first = _Keeping() if kind in ("kept", "loss", "called") else nn.Linear(8, 1)
    second = {"kept": _OfOther, "called": _Calling}.get(kind, lambda other: nn.Linear(8, 1))(first)
    losses = [MSELoss(), _WithOther(first) if kind == "loss" else MSELoss()]
    given = {
        "task_dict": tasks(*losses),
        "encoder_class": encoder,
        "decoders": nn.ModuleDict({"ctr": first, "ctcvr": second}),
        "trainer_class": _Product if kind == "product" else Trainer,
        "optim_param": {"optim": "sgd", "lr": 0.5},
    }
    if kind == "one piece":
        given["architecture"] = _OnePiece
    return make_trainer(weighting, **(given | options))


def coupled_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 6, generator=generator)
    return x, {task: torch.rand(8, 1, generator=generator) for task in TASKS}


def gradient_rows(trainer: Any, batch: Batch) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return the gradients of each loss by plain autograd: of the shared parameters, and of the others."""
    problem = trainer.step.problem
    count = len(problem.shared_params)
    rows = []
    for t in range(len(batch[1])):
        losses, _ = problem.whole(*batch)
        params = [*problem.shared_params, *problem.task_params]
        rows.append(torch.autograd.grad(losses[t], params, allow_unused=True, materialize_grads=True))
    return [list(row[:count]) for row in rows], [list(row[count:]) for row in rows]


def flattened(row: list[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in row])


def _weights(moved: Tensor, rows: list[list[Tensor]]) -> Tensor:
    """Return the weights of rows in a sum, and check that it is one."""
    matrix = torch.stack([flattened(row) for row in rows]).T
    weights = torch.linalg.lstsq(matrix, moved[:, None]).solution
    torch.testing.assert_close((matrix @ weights)[:, 0], moved, rtol=1e-9, atol=1e-11)
    return weights[:, 0]


def step_weights(trainer: Any, batch: Batch, plain: Any = None) -> tuple[Tensor, Tensor]:
    """Run a step; return the weights of each loss's gradient by plain autograd in its update: shared, and others."""
    trainer.model.epoch, trainer.model.epochs = 0, 1
    rows = gradient_rows(plain or trainer, batch)
    problem = trainer.step.problem
    groups = problem.shared_params, problem.task_params
    before = [[param.detach().clone() for param in params] for params in groups]
    trainer.step([batch], StepBuffer())
    moved = [
        flattened([(old - param.detach()) / 0.5 for old, param in zip(olds, params, strict=True)])
        for olds, params in zip(before, groups, strict=True)
    ]
    return _weights(moved[0], rows[0]), _weights(moved[1], rows[1])
