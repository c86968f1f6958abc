"""Losses that touch a part of the network are differentiated with respect to that part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl.aggregation import UPGrad
from fastmtl.architecture import HPS
from fastmtl.engine.comm import Comm
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.toy import loaders, make_trainer, task_dict

TASKS, BRANCHES = 12, 3


class _Branches(nn.Module):
    """A stem and three branches; each returns features of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.branches = nn.ModuleList(nn.Linear(6, 8) for _ in range(BRANCHES))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.stem(inputs).tanh()
        return {str(k): branch(hidden if k else inputs).tanh() for k, branch in enumerate(self.branches)}


class _OfBranch(HPS):
    """A task reads the features of one branch, the last task those of all."""

    def trunk(self, inputs: Any, task_name: str | None = None) -> Any:
        return self.encoder(inputs)

    def branch(self, features: Any, task: str) -> Any:
        number = int(task.removeprefix("task"))
        return sum(features.values()) if number == TASKS - 1 else features[str(number % BRANCHES)]


class _OnePiece(_OfBranch):
    def forward(self, inputs: Any, task_name: str | None = None) -> Any:
        features = self.trunk(inputs)
        return {task: self.decoders[task](self.branch(features, task)) for task in self.task_name}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[int] | None]:
    """The places that rows were asked for."""
    places: list[Sequence[int] | None] = []
    row = Comm.row

    def noting(self: Comm, *args: Any, **kwargs: Any) -> Any:
        places.append(kwargs["reached"] if "reached" in kwargs else args[6])
        return row(self, *args, **kwargs)

    monkeypatch.setattr(Comm, "row", noting)
    return places


def _losses(trainer: Any, batch: Any) -> list[Tensor]:
    inputs, labels = batch
    preds = trainer.model(inputs)
    return [trainer.task_dict[task]["loss_fn"].compute_loss(preds[task], labels[task]) for task in trainer.task_name]


@pytest.mark.parametrize("network", [_OfBranch, _OnePiece])
@pytest.mark.parametrize("name", ["MGDA", "UPGrad"])
def test_the_trainer_gives_the_plain_gradients(name: str, network: Any, asked: list[Any]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        trainer: Any = make_trainer(name, network, TASKS, encoder_class=_Branches, vjps="sequential")
        inputs, labels = next(iter(loaders(TASKS)))
        labels = {task: y.double() if y.is_floating_point() else y for task, y in labels.items()}
        batch = inputs.double(), labels
        shared = [param for param in trainer.model.get_share_params() if param.requires_grad]
        rows = [
            torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in _losses(trainer, batch)
        ]
        trainer.step([batch], StepBuffer())
    finally:
        torch.set_default_dtype(torch.float32)
    weights = trainer.step.latest.weights
    for k, param in enumerate(shared):
        want = sum(w * row[k] for w, row in zip(weights, rows, strict=True) if row[k] is not None)
        torch.testing.assert_close(param.grad, want)
    assert len(asked) == TASKS
    # Stem and branch, each with weight and bias; the first branch goes round the stem.
    assert [None if places is None else len(places) for places in asked[:3]] == [2, 4, 4]
    assert asked[-1] is None or len(asked[-1]) == len(shared)


def test_balance_gives_the_plain_gradients(asked: list[Any]) -> None:
    torch.manual_seed(0)
    encoder, heads = _Branches(), nn.ModuleList(nn.Linear(8, 1) for _ in range(TASKS))
    inputs = torch.randn(5, 6)
    spare = nn.Parameter(torch.ones(3))

    def losses() -> list[Tensor]:
        features = encoder(inputs)
        return [head(features[str(t % BRANCHES)]).square().mean() for t, head in enumerate(heads)] + [spare.sum()]

    shared = list(encoder.parameters())
    rows = [torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in losses()]
    weights = fastmtl.balance(losses(), shared=encoder, weighting=UPGrad())
    assert weights is not None
    for k, param in enumerate(shared):
        torch.testing.assert_close(
            param.grad, sum(w * row[k] for w, row in zip(weights, rows, strict=True) if row[k] is not None)
        )
    own = torch.autograd.grad(sum(losses()), [*heads.parameters(), spare])
    for param, grad in zip([*heads.parameters(), spare], own, strict=True):
        torch.testing.assert_close(param.grad, grad)
    assert [None if places is None else len(places) for places in asked] == [*([2, 4, 4] * (TASKS // BRANCHES)), 0]


def test_few_losses_of_one_piece_are_not_looked_at(asked: list[Any]) -> None:
    decoders = {f"task{t}": nn.Linear(8, 1 if t % 2 else 3) for t in range(2)}
    trainer = make_trainer("MGDA", _OnePiece, 2, encoder_class=_Branches, decoders=decoders, task_dict=task_dict(2))
    trainer.step([next(iter(loaders(2)))], StepBuffer())
    assert asked == [None, None]
