"""Steps of several batches equal steps of one batch of all their rows."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fastmtl.errors import UsageError
from fastmtl.loss import MSELoss, SegLoss
from fastmtl.metrics import SegMetric
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.precision import LossScaler
from fastmtl.weighting import WEIGHTINGS
from tests.trainer.toy import flat, loaders, make_trainer, task_dict

ACCUMULATED = sorted(
    name for name, rule in WEIGHTINGS.items() if rule.needs not in ("lookahead", "reps") and rule.samples == 1
)


def _grads(name: str, accumulate: int, multi_input: bool = False, **options: Any) -> Any:
    """Gradients, losses and predictions of the second step, on 24 rows in `accumulate` batches."""
    trainer = make_trainer(name, count=3, accumulate=accumulate, multi_input=multi_input, **options)
    trainer.model.epoch, trainer.model.epochs = 0, 1
    if isinstance(trainer.step.scaler, LossScaler):
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
        joined = torch.cat([each[task].detach() for each in many[2]])
        torch.testing.assert_close(joined, one[2][0][task].detach(), rtol=1e-3, atol=1e-4)
    for mine, other in zip(many[3], one[3], strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["MGDA", "Nash_MTL", "EW", "UW"])
@pytest.mark.parametrize("option", [{"rep_grad": True}, {"precision": "fp16"}, {"tasks_per_step": 2}])
def test_goes_with_other_options(name: str, option: dict[str, Any]) -> None:
    if "rep_grad" in option and not WEIGHTINGS[name].allows_rep_grad:
        pytest.skip("refused for another reason")
    one, many = _grads(name, 1, **option), _grads(name, 3, **option)
    assert (one[0] - many[0]).norm() <= (0.02 if "precision" in option else 2e-3) * one[0].norm()


def _unlike_batches() -> tuple[list[Any], list[Any]]:
    """Three batches of other sizes and numbers of labels, one without any of the last task, and all their rows."""
    x, labels = next(iter(loaders(3, batch=24)))
    labels["task0"][:4] = -100
    labels["task1"][[2, 3, 9, 10, 11, 20]] = torch.nan
    labels["task2"][:6] = labels["task2"][8:23] = -100
    rows = [slice(0, 5), slice(5, 14), slice(14, 24)]
    parts = [(x[some], {task: each[some] for task, each in labels.items()}) for some in rows]
    del parts[0][1]["task2"]
    return parts, [(x, labels)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ACCUMULATED),
        ("MGDA", {"rep_grad": True}),
        ("MGDA", {"precision": "fp16"}),
        ("PCGrad", {"update_weights_every": 2}),
        ("MGDA", {"weight_momentum": 0.5, "clip_grad_norm": 0.1}),
        ("UW", {"weight_momentum": 0.5}),
        ("MGDA", {"vjps": "batched"}),
        ("MGDA", {"architecture": "MMoE", "arch_args": {"img_size": [6], "num_experts": [2]}}),
    ],
    ids=str,
)
def test_batches_count_by_their_labels(name: str, options: dict[str, Any]) -> None:
    found = []
    for batches in _unlike_batches():
        trainer = make_trainer(name, count=3, accumulate=3, **options)
        trainer.model.epoch, trainer.model.epochs = 0, 1
        if isinstance(trainer.step.scaler, LossScaler):
            trainer.step.scaler.scale.fill_(2.0**8)
        random.seed(0)
        trainer.meter.begin()
        losses: Any = None
        for _ in range(2):
            torch.manual_seed(3)
            losses, preds = trainer.step(batches, StepBuffer())
            for (_, labels), each in zip(batches, preds, strict=True):
                trainer.meter.update(losses, each, labels)
        trainer.meter.end()
        grads = flat([param.grad for param in trainer.model.parameters() if param.grad is not None])
        found.append((grads, torch.stack(list(losses.values())), trainer.meter.loss_item, trainer.meter.results))
    many, one = found
    assert (one[0] - many[0]).norm() <= (0.02 if "precision" in options else 2e-3) * one[0].norm()
    close = {"rtol": 1e-2, "atol": 1e-3} if "precision" in options else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(many[1], one[1], **close)
    assert many[2] == pytest.approx(one[2], rel=close["rtol"])
    for task, scores in one[3].items():
        assert many[3][task] == pytest.approx(scores, rel=close["rtol"])


def test_batches_of_one_step_may_differ_in_shape() -> None:
    class Flexible(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Conv2d(3, 8, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.inner(images)

    trainer = make_trainer(
        "MGDA", encoder_class=Flexible, accumulate=2,
        decoders=torch.nn.ModuleDict({task: torch.nn.Conv2d(8, 2, 1) for task in ("task0", "task1")}),
        task_dict={
            task: {"metrics": ["mIoU", "pix"], "metrics_fn": SegMetric(2), "loss_fn": SegLoss(), "weight": [1, 1]}
            for task in ("task0", "task1")
        },
    )  # fmt: skip
    data = [
        (torch.randn(2, 3, size, size), dict.fromkeys(("task0", "task1"), torch.ones(2, size - 2, size - 2)))
        for size in (8, 12)
    ]

    def mean_loss(task: str) -> float:
        """Return the mean over all pixels."""
        with torch.no_grad():
            losses = [SegLoss().compute_loss(trainer.model(images)[task], labels[task]) for images, labels in data]
        return sum(float(loss) * (size - 2) ** 2 for loss, size in zip(losses, (8, 12), strict=True)) / (6**2 + 10**2)

    expected = [mean_loss(task) for task in trainer.task_name]
    losses, preds = trainer.step(data, StepBuffer())
    assert [float(loss) for loss in losses.values()] == pytest.approx(expected)
    assert [each["task0"].shape[-1] for each in preds] == [6, 10]
    trainer.train(data, data, 1)


class _TwoParts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 1)

    def forward(self, rep: torch.Tensor) -> dict[str, Any]:
        found = self.inner(rep)
        return {"mean": found, "others": (found.exp(), "name")}


class _OfTheMean(MSELoss):
    def compute_loss(self, pred: Any, gt: torch.Tensor) -> torch.Tensor:
        return super().compute_loss(pred["mean"], gt)


def test_a_batch_may_lack_a_task_whose_predictions_are_several() -> None:
    whole, (x, labels) = {"task0": torch.nn.Linear(8, 3), "task1": _TwoParts()}, next(iter(loaders()))
    tasks = task_dict(2)
    tasks["task1"]["loss_fn"] = _OfTheMean()
    trainer = make_trainer("MGDA", task_dict=tasks, accumulate=2, decoders=torch.nn.ModuleDict(whole))
    expected = trainer.step.problem.whole(x, labels)[0]
    losses, _ = trainer.step([(x, {"task0": labels["task0"]}), (x, labels)], StepBuffer())
    torch.testing.assert_close(torch.stack(list(losses.values())), torch.stack(expected).detach())


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
