"""Functions and methods as losses: what they hold is trained or refused, and weights of classes of any precision."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.errors import CheckpointError, UsageError
from tests.trainer.test_learned_losses import Plain, learned
from tests.trainer.toy import fill_grads, loaders, make_trainer


class Distance:
    """A plain object whose method is a loss, with a parameter."""

    def __init__(self) -> None:
        self.scale = nn.Parameter(torch.tensor(1.5))

    def loss(self, pred: Tensor, gt: Tensor, power: float = 2.0) -> Tensor:
        return (self.scale * (pred - gt).abs() ** power).mean()

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return self.loss(pred, gt)


class Powered(Plain):
    def forward(self, pred: Tensor, gt: Tensor, power: float = 2.0) -> Tensor:
        return (self.scale * (pred - gt).abs() ** power).mean()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Distance().loss,
        lambda: partial(Distance().loss, power=2.0),
        lambda: partial(Powered(), power=2.0),
        lambda: partial(partial(Powered()), power=2.0),
        lambda: Powered().forward,
    ],
    ids=["method", "partial of a method", "partial", "partial of a partial", "forward"],
)
def test_methods_and_functions_with_arguments_are_trained(make: Any) -> None:
    trainer = make_trainer("EW", task_dict=learned(task1=make()))
    batch = next(iter(loaders()))
    fill_grads(trainer, [batch])
    name = "loss_fn.task1.scale"
    grad = dict(trainer.model.named_parameters())[name].grad
    with torch.no_grad():
        pred = trainer.model(batch[0])["task1"]
    expected = (pred - batch[1]["task1"]).square().mean()
    torch.testing.assert_close(grad, expected)
    before = dict(trainer.model.named_parameters())[name].item()
    trainer.train(loaders(), loaders(), 1)
    assert dict(trainer.model.named_parameters())[name].item() != before


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "UW", "FAMO"])
@pytest.mark.parametrize("kind", ["object", "compute_loss", "dict", "default", "helper"])
def test_what_a_function_trains_unseen_is_refused_in_the_first_step(kind: str, weighting: str) -> None:
    hidden = Distance()
    box = {"scale": hidden.scale}

    def helper(pred: Tensor, gt: Tensor) -> Tensor:
        return hidden.loss(pred, gt)

    loss_fn = {
        "object": lambda pred, gt: hidden.loss(pred, gt),
        "compute_loss": lambda pred, gt: hidden.compute_loss(pred, gt),
        "dict": lambda pred, gt: box["scale"] * (pred - gt).square().mean(),
        "default": lambda pred, gt, scale=hidden.scale: scale * (pred - gt).square().mean(),
        "helper": lambda pred, gt: helper(pred, gt),
    }[kind]
    trainer = make_trainer(weighting, task_dict=learned(task1=loss_fn))
    before = [param.clone() for param in trainer.model.parameters()]
    with pytest.raises(UsageError, match=r"\['task1'\]\['loss_fn'\] depends on parameters that are not the mod"):
        trainer.train(loaders(), loaders(), 1)
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    hidden.scale.requires_grad_(False)
    make_trainer(weighting, task_dict=learned(task1=loss_fn)).train(loaders(), loaders(), 1)


def test_functions_may_use_the_model_s_parameters() -> None:
    trainer: Any = None

    def loss(pred: Tensor, gt: Tensor) -> Tensor:
        return (pred - gt).square().mean() + sum(param.square().sum() for param in trainer.model.decoders.parameters())

    trainer = make_trainer("EW", task_dict=learned(task1=loss))
    trainer.train(loaders(), loaders(), 1)


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(weight=torch.tensor([1, 2, 3])),
        partial(F.cross_entropy, weight=[1.0, 2, 3]),
        partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
    ],
    ids=["double", "integers", "list", "double of a function"],
)
def test_weights_of_classes_in_another_precision(loss_fn: Any) -> None:
    x, labels = next(iter(loaders()))
    weight = torch.tensor([1.0, 2.0, 3.0])
    for dtype in (torch.float32, torch.float64):
        trainer = make_trainer("EW", task_dict=learned(task0=loss_fn))
        pred = trainer.model(x)["task0"].detach().to(dtype)
        value = trainer.meter.losses["task0"].compute_loss(pred, labels["task0"])
        assert value.dtype == dtype
        torch.testing.assert_close(value, F.cross_entropy(pred, labels["task0"], weight.to(dtype)))


def test_weights_of_other_numbers_of_classes_are_refused() -> None:
    trainer = make_trainer("EW", task_dict=learned(task0=nn.CrossEntropyLoss(weight=torch.ones(2))))
    with pytest.raises(UsageError, match=r"CrossEntropyLoss has weights of shape \(2,\), and predictions of 3 classes"):
        trainer.train(loaders(), loaders(), 1)


def weighted(*weight: float) -> Any:
    return learned(task0=nn.CrossEntropyLoss(weight=torch.tensor(weight)), task1=nn.MSELoss())


def test_weights_of_a_loss_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer("EW", task_dict=weighted(1.0, 2.0, 3.0), save_path=str(tmp_path)).train(loaders(), loaders(), 1)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    for options in ({"resume": str(tmp_path)}, {"load_path": str(tmp_path)}):
        capsys.readouterr()
        trainer = make_trainer("EW", task_dict=weighted(4.0, 5.0, 6.0), **options)
        assert trainer.meter.losses["task0"].inner.weight.tolist() == [4.0, 5.0, 6.0]
        assert torch.equal(trainer.model.decoders["task0"].weight, best["decoders.task0.weight"])
        assert "Weights of losses are this run's, not the file's: loss_fn.task0.weight" in capsys.readouterr().out
        make_trainer("EW", task_dict=weighted(1.0, 2.0, 3.0), **options)
        assert "Weights of losses" not in capsys.readouterr().out
        plain = learned(task0=nn.CrossEntropyLoss(), task1=nn.MSELoss())
        make_trainer("EW", task_dict=plain, **options)
        assert "not the file's: loss_fn.task0.weight" in capsys.readouterr().out


def test_a_run_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    make_trainer("EW", task_dict=learned(task0=nn.CrossEntropyLoss()), save_path=str(tmp_path)).train(
        loaders(), loaders(), 1
    )
    plain = learned(task0=nn.CrossEntropyLoss(), task1=nn.MSELoss())
    with pytest.raises(
        CheckpointError, match=r"other losses: loss_fn\.task1\.log_variance is not in this run's losses"
    ):
        make_trainer("EW", task_dict=plain, resume=str(tmp_path))
