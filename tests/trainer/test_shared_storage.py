"""Gradients that autograd hands out twice, expanded, or as pieces of a whole: nothing is written into them twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.engine.gradients import set_grads
from fastmtl.loss import CELoss
from fastmtl.metrics import AccMetric
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.precision import LossScaler
from tests.trainer.toy import loaders, make_trainer


class _Sum(nn.Module):
    """A linear layer whose weight is a sum, as in LoRA."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(outputs, 8) * 0.1)
        self.delta = nn.Parameter(torch.randn(outputs, 8) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.base + self.delta).T


@pytest.mark.parametrize(
    "options", [{}, {"clip_grad_norm": 1e-3}, {"precision": "fp16"}, {"update_weights_every": 2}], ids=str
)
@pytest.mark.parametrize("weighting", ["FairGrad", "MGDA"])
def test_what_is_summed_up_gets_its_gradient_once(weighting: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    decoders = nn.ModuleDict({"task0": _Sum(3), "task1": _Sum(1)})
    trainer = make_trainer(weighting, decoders=decoders, optim_param={"optim": "sgd", "lr": 0.0}, **options)
    if isinstance(trainer.step.scaler, LossScaler):
        trainer.step.scaler.scale.fill_(2.0**8)
    batch, buffer = next(iter(loaders())), StepBuffer()
    for _ in range(2):
        trainer.step([batch], buffer)
    shown = buffer.flush(0, 1).weights
    assert shown is not None
    weights = torch.from_numpy(shown[-1]).float() if weighting == "FairGrad" else torch.ones(2)
    own = trainer.step.problem.task_params
    losses, _ = trainer.step.problem.whole(*batch)
    expected = torch.autograd.grad(list(losses), own, list(weights))
    grads = [param.grad for param in own]
    clip = options.get("clip_grad_norm")
    if clip:
        total = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(total, torch.tensor(clip), rtol=1e-3, atol=0.0)
        expected = tuple(each * (grads[0].norm() / expected[0].norm()) for each in expected)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3 if "precision" in options else 1e-5)


def test_no_two_parameters_and_no_two_entries_share_memory() -> None:
    one, whole = torch.ones(2, 3), torch.ones(4)
    given = [one, one, torch.ones(()).expand(5), whole[:2], whole[2:], None]
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (2, 3), (5,), (2,), (2,), (1,))]
    set_grads(params, given)
    for param in params[:-1]:
        assert param.grad is not None
        param.grad.mul_(2)
    for param in params[:-1]:
        assert torch.equal(param.grad, torch.full_like(param, 2.0))
    assert params[0].grad is one
    assert params[-1].grad is None


class _InTraining(nn.Module):
    """A decoder with a layer that takes part in training only."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(8, outputs)
        self.aux = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out + self.aux(x) if self.training else out


def test_a_layer_of_training_alone_gets_the_weight_of_its_own_task() -> None:
    decoders = nn.ModuleDict({"task0": _InTraining(3), "task1": _InTraining(1)})
    trainer = make_trainer("FairGrad", decoders=decoders, optim_param={"optim": "sgd", "lr": 0.0})
    batch, buffer = next(iter(loaders())), StepBuffer()
    trainer.step([batch], buffer)
    shown = buffer.flush(0, 1).weights
    assert shown is not None
    weights = torch.from_numpy(shown[0]).float()
    assert weights.max() > 1.5 * weights.min()
    losses, _ = trainer.step.problem.whole(*batch)
    own = trainer.step.problem.task_params
    for param, expected in zip(own, torch.autograd.grad(list(losses), own, list(weights)), strict=True):
        torch.testing.assert_close(param.grad, expected)


def test_finding_owners_leaves_no_trace() -> None:
    grown = []
    for weighting in ("FairGrad", "EW"):
        decoders = nn.ModuleDict(
            {
                name: nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1 + 2 * (name == "task0")))
                for name in ("task0", "task1")
            }
        )
        trainer = make_trainer(weighting, decoders=decoders)
        torch.manual_seed(3)
        trainer.step([next(iter(loaders()))], StepBuffer())
        norm = decoders["task0"][0]
        grown.append((int(norm.num_batches_tracked), torch.rand(())))
    assert grown[0] == grown[1]
    assert grown[0][0] == 1


class _Offset(nn.Module):
    """Predictions with a number that is added to the loss: its gradient is what the loss is differentiated with."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(8, outputs)
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x).float(), self.offset


class _WithOffset(CELoss):
    def compute_loss(self, pred: Any, gt: Tensor) -> Tensor:
        return super().compute_loss(pred[0], gt) + pred[1]


class _Ignored(AccMetric):
    def update_fun(self, pred: Any, gt: Tensor) -> None:
        super().update_fun(pred[0], gt)


def test_the_loss_scale_is_no_gradient() -> None:
    about = {"metrics": ["Acc"], "weight": [1]}
    tasks = {task: {"metrics_fn": _Ignored(), "loss_fn": _WithOffset(), **about} for task in ("task0", "task1")}
    decoders = nn.ModuleDict({task: _Offset(3) for task in tasks})
    trainer = make_trainer("MGDA", task_dict=tasks, decoders=decoders, precision="fp16")
    assert isinstance(trainer.step.scaler, LossScaler)
    trainer.step.scaler.scale.fill_(2.0**8)
    x, labels = next(iter(loaders()))
    trainer.step([(x, dict.fromkeys(tasks, labels["task0"]))], StepBuffer())
    assert float(trainer.step.scaler.scale) == 2.0**8
    assert [float(module.offset.grad) for module in decoders.values()] == [1.0, 1.0]
