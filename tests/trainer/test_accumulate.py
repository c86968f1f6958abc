"""Steps of several batches equal steps of one batch of all their rows."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fastmtl.errors import UsageError
from fastmtl.trainer.records import StepBuffer
from fastmtl.weighting import WEIGHTINGS
from tests.trainer.toy import flat, loaders, make_trainer

ACCUMULATED = sorted(
    name for name, rule in WEIGHTINGS.items() if rule.needs not in ("lookahead", "reps") and rule.samples == 1
)


def _grads(name: str, accumulate: int, multi_input: bool = False, **options: Any) -> Any:
    """Gradients, losses and predictions of the second step, on 24 rows in `accumulate` batches."""
    trainer = make_trainer(name, count=3, accumulate=accumulate, multi_input=multi_input, **options)
    trainer.model.epoch, trainer.model.epochs = 0, 1
    if trainer.step.scaler is not None:
        trainer.step.scaler.scale.fill_(2.0**8)
    random.seed(0)
    given = loaders(3, batch=24 // accumulate, multi_input=multi_input)
    if multi_input:
        parts = {task: list(loader) for task, loader in given.items()}
        batches = [
            ({task: each[k][0] for task, each in parts.items()}, {task: each[k][1] for task, each in parts.items()})
            for k in range(accumulate)
        ]
    else:
        batches = list(given)
    losses: Any = None
    preds: Any = None
    for _ in range(2):
        torch.manual_seed(3)
        losses, preds = trainer.step(batches, StepBuffer())
    state = [getattr(trainer.model, each) for each in trainer.model.remembered()]
    return flat([param.grad for param in trainer.model.parameters() if param.grad is not None]), losses, preds, state


@pytest.mark.parametrize("name", ACCUMULATED)
@pytest.mark.parametrize("multi_input", [False, True], ids=["single", "multi"])
def test_equals_one_large_batch(name: str, multi_input: bool) -> None:
    one, many = _grads(name, 1, multi_input), _grads(name, 3, multi_input)
    assert (one[0] - many[0]).norm() <= 2e-3 * one[0].norm()
    for task, loss in one[1].items():
        torch.testing.assert_close(many[1][task], loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(many[2][task], one[2][task].detach(), rtol=1e-3, atol=1e-4)
    for mine, other in zip(many[3], one[3], strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["MGDA", "Nash_MTL", "EW", "UW"])
@pytest.mark.parametrize("option", [{"rep_grad": True}, {"precision": "fp16"}, {"tasks_per_step": 2}])
def test_goes_with_other_options(name: str, option: dict[str, Any]) -> None:
    if name == "UW" and "tasks_per_step" in option:
        pytest.skip("refused for another reason")
    if "rep_grad" in option and not WEIGHTINGS[name].allows_rep_grad:
        pytest.skip("refused for another reason")
    one, many = _grads(name, 1, **option), _grads(name, 3, **option)
    assert (one[0] - many[0]).norm() <= (0.02 if "precision" in option else 2e-3) * one[0].norm()


def test_held_weights_accumulate_too() -> None:
    one, many = (_grads("MGDA", count, update_weights_every=2) for count in (1, 3))
    assert (one[0] - many[0]).norm() <= 1e-4 * one[0].norm()


def test_the_last_step_of_an_epoch_takes_what_is_left() -> None:
    trainer = make_trainer("MGDA", accumulate=2)
    data = loaders(rows=40, batch=8)
    weights = trainer.train(data, data, 2, return_weight=True)
    assert weights.shape == (2, 2, 3)
    assert trainer.meter.results["task0"][0] <= 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [("MoDo", "takes several batches per step"), ("MOML", "runs backward passes of its own"), ("GradDrop", "at once")],
)
def test_what_cannot_accumulate_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"accumulate must be 1 for {name}, which .*{reason}"):
        make_trainer(name, accumulate=2, rep_grad=name == "GradDrop")
