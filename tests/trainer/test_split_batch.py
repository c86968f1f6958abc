"""Halves that a user's function returns, and those of a batch with few rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.engine.halving import Halving, checked_halves
from fastmtl.errors import UsageError
from tests.trainer.toy import encoder, flat, loaders, make_trainer

BILEVEL = ["MOML", "AutoLambda", "FORUM"]


def _halve(inputs: Any, labels: Any) -> Any:
    middle = len(inputs) // 2
    parts = (slice(None, middle), slice(middle, None))
    return [(inputs[part], {task: label[part] for task, label in labels.items()}) for part in parts]


def _relabelled(change: Any) -> Any:
    return lambda inputs, labels: [(half, change(own, k)) for k, (half, own) in enumerate(_halve(inputs, labels))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own, k: {}, "every task in both halves, got none of 'task0'"),
        (lambda own, k: {"task0": own["task0"]} if k else own, "got none of 'task1'"),
        (lambda own, k: {**own, "task1": None}, "got none of 'task1'"),
        (lambda own, k: {**own, "taks1": own["task1"]}, "returned labels of 'taks1', of which the batch has none"),
        (lambda own, k: {**own, "task1": own["task1"][:0]} if k else own, r"without rows in labels\['task1'\]"),
    ],
    ids=["none", "one", "empty", "strange", "no-rows"],
)
@pytest.mark.parametrize("weighting", BILEVEL)
def test_a_hook_that_loses_labels_is_refused(weighting: str, change: Any, message: str) -> None:
    trainer = make_trainer(weighting, split_batch=_relabelled(change))
    before = flat(trainer.model.parameters())
    with pytest.raises(UsageError, match=f"^split_batch .*{message}"):
        trainer.train(loaders(), loaders(), 1)
    assert torch.equal(flat(trainer.model.parameters()), before)


def test_a_hook_that_returns_a_half_without_rows() -> None:
    def halve(inputs: Any, labels: Any) -> Any:
        return (inputs, labels), (inputs[:0], {task: label[:0] for task, label in labels.items()})

    with pytest.raises(UsageError, match="a half without rows in inputs"):
        make_trainer("MOML", split_batch=halve).train(loaders(), loaders(), 1)
    inputs = {"a": torch.ones(4, 2), "b": torch.ones(3, 2)}
    labels = {"a": torch.ones(4), "b": torch.ones(3)}
    lost = (inputs, {**labels, "b": torch.ones(0)})
    with pytest.raises(UsageError, match=r"without rows in labels\['b'\]"):
        checked_halves([(inputs, labels), lost], labels, multi_input=True)
    # Boxes of all images in one tensor, none of them in one half.
    boxes = {"boxes": torch.ones(7, 6), "kind": torch.ones(4)}
    halves_of_boxes = [
        (torch.ones(2, 3), {"boxes": torch.ones(n, 6), "kind": torch.ones(2), "further": None}) for n in (0, 7)
    ]
    assert checked_halves(halves_of_boxes, boxes)[0][1]["boxes"].shape == (0, 6)


@pytest.mark.parametrize("hook", [3, "rows", lambda batch: batch, lambda inputs, labels, more: None])
def test_a_hook_that_cannot_be_called_is_refused_at_once(hook: Any) -> None:
    with pytest.raises(UsageError, match=r"^split_batch must (be a function of|take two arguments,) inputs and labels"):
        make_trainer("MOML", split_batch=hook)


class Normalised(nn.Module):
    """The toy's encoder with batch normalisation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(encoder(), nn.BatchNorm1d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("weighting", BILEVEL)
def test_a_hooks_halves_of_one_row_that_batch_normalisation_refuses(weighting: str) -> None:
    batches = [(x[:2], {task: label[:2] for task, label in labels.items()}) for x, labels in loaders()]
    trainer = make_trainer(weighting, encoder_class=Normalised, split_batch=_halve)
    with pytest.raises(UsageError, match=r"^A half of a batch has too few rows for batch normalisation.*drop_last"):
        trainer.train(batches, batches, 1)


@pytest.mark.parametrize("weighting", BILEVEL)
@pytest.mark.parametrize("rows", [2, 3])
def test_few_rows_of_a_network_that_normalises_are_both_halves(weighting: str, rows: int) -> None:
    batches = [(x[:n], {task: own[:n] for task, own in labels.items()}) for n in (8, rows) for x, labels in loaders()]
    ends = []
    for options in ({}, {"split_batch": lambda x, y: ((x, y), (x, y)) if len(x) == rows else _halve(x, y)}):
        trainer = make_trainer(weighting, encoder_class=Normalised, **options)
        trainer.train(batches, batches, 1)
        ends.append(flat(trainer.model.parameters()))
    assert torch.equal(*ends)
    assert len(Halving()(torch.ones(rows, 2), {"task": torch.ones(rows)})[0][0]) == 1
