"""Losses and scores depend on the labelled entries alone, whatever the batch size, accumulation or missing labels."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.engine.labels import labelled_entries, present_tasks
from fastmtl.loss import AbsLoss, BCELoss, CELoss, DepthLoss, FocalLoss, HuberLoss, L1Loss, MSELoss, NormalLoss, SegLoss
from fastmtl.metrics import AbsMetric, AccMetric, DepthMetric, L1Metric, NormalMetric, SegMetric
from fastmtl.support.running import RunningMean
from fastmtl.trainer.log.history import History
from fastmtl.trainer.log.jsonl import JsonlLogger, read_jsonl
from fastmtl.trainer.log.logger import RunInfo
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.toy import fill_grads, flat, loaders, make_trainer

NAN = math.nan
ROWS = 24
WEIGHT = [0.1, 1.0, 0.03]


class Rounded(AbsMetric):
    """A metric of a user: the mean of what it is shown."""

    def update_fun(self, pred: Any, gt: Tensor) -> None:
        self.record.append(gt.double().sum().item())
        self.bs.append(gt.numel())

    def score_fun(self) -> list[float]:
        return [sum(self.record) / sum(self.bs)]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _task(loss: AbsLoss, metric: AbsMetric, scores: int = 1) -> dict[str, Any]:
    return {"metrics": ["m"] * scores, "metrics_fn": metric, "loss_fn": loss, "weight": [0] * scores}


def _vectors(places: int) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, int]]:
    """Tasks on vectors, their labels, of which batches have unlike shares, and the outputs of their decoders."""
    real = _draw(ROWS, 2, seed=1)
    real[_draw(ROWS, 2, seed=2) > torch.linspace(-2, 1, ROWS)[:, None]] = NAN
    classes = torch.randint(3, (ROWS,), generator=torch.Generator().manual_seed(3))
    classes[:9:2] = -100
    binary = torch.where(real.isnan(), NAN, (real > 0).double())
    tasks = {
        "pairs": _task(MSELoss(), L1Metric()),
        "errors": _task(HuberLoss(0.5), Rounded()),
        "classes": _task(CELoss(weight=WEIGHT, label_smoothing=0.1), AccMetric()),
        "binary": _task(BCELoss(pos_weight=[0.5, 2.0]), Rounded()),
        "focal": _task(FocalLoss(alpha=WEIGHT), AccMetric()),
    }
    labels = {"pairs": real, "errors": real * 2, "classes": classes, "binary": binary, "focal": classes.flip(0)}
    widths = {"pairs": 2, "errors": 2, "classes": 3, "binary": 2, "focal": 3}
    names = list(tasks)[:places]
    return {n: tasks[n] for n in names}, {n: labels[n] for n in names}, {n: widths[n] for n in names}


def _vector_trainer(places: int = 5, weighting: str = "EW", **options: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    tasks, labels, widths = _vectors(places)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        decoders = nn.ModuleDict({task: nn.Linear(8, width) for task, width in widths.items()})
        trainer = make_trainer(weighting, count=places, task_dict=tasks, decoders=decoders, **options)
    finally:
        torch.set_default_dtype(before)
    return trainer, _draw(ROWS, 6, seed=4), labels


def _cut(x: Tensor, labels: dict[str, Tensor], size: int) -> list[Any]:
    return [(x[rows], {task: own[rows] for task, own in labels.items()}) for rows in torch.arange(len(x)).split(size)]


def _by_hand(preds: dict[str, Tensor], labels: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Return losses and scores of all labelled entries together."""
    known = {task: ~own.isnan() if own.is_floating_point() else own >= 0 for task, own in labels.items()}
    pred = {task: preds[task][known[task]] for task in preds}
    gt = {task: labels[task][known[task]] for task in preds}
    weight, half = torch.tensor(WEIGHT, dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    by_entry = half.expand(ROWS, 2)[known["binary"]]
    chances = pred["focal"].softmax(1).gather(1, gt["focal"][:, None])[:, 0]
    error = (pred["errors"] - gt["errors"]).abs()
    losses = {
        "pairs": (pred["pairs"] - gt["pairs"]).square().mean(),
        "errors": torch.where(error < 0.5, error**2 / 2, 0.5 * (error - 0.25)).mean(),
        "classes": F.cross_entropy(pred["classes"], gt["classes"], weight, label_smoothing=0.1),
        "binary": F.binary_cross_entropy_with_logits(pred["binary"], gt["binary"], pos_weight=by_entry),
        "focal": (-weight[gt["focal"]] * (1 - chances) ** 2 * chances.log()).mean(),
    }
    scores = {
        "pairs": (pred["pairs"] - gt["pairs"]).abs().mean(),
        "errors": gt["errors"].mean(),
        "classes": (pred["classes"].argmax(1) == gt["classes"]).double().mean(),
        "binary": gt["binary"].mean(),
        "focal": (pred["focal"].argmax(1) == gt["focal"]).double().mean(),
    }
    return {task: value.item() for task, value in losses.items()}, {task: each.item() for task, each in scores.items()}


@pytest.mark.parametrize("size", [1, 3, 8, 24])
@pytest.mark.parametrize("mode", ["train", "test"])
def test_a_pass_over_vectors(size: int, mode: str) -> None:
    trainer, x, labels = _vector_trainer(optim_param={"optim": "sgd", "lr": 0.0})
    with torch.no_grad():
        preds = trainer.model(x)
    losses, scores = _by_hand(preds, labels)
    batches = _cut(x, labels, size)
    if mode == "train":
        trainer.train(batches, batches, 1)
        assert trainer.model.train_loss_buffer[:, 0] == pytest.approx(list(losses.values()), rel=1e-12)
    else:
        trainer.test(batches)
    assert trainer.meter.loss_item == pytest.approx(list(losses.values()), rel=1e-12)
    assert [scores[0] for scores in trainer.meter.results.values()] == pytest.approx(list(scores.values()), rel=1e-12)


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "UW"])
@pytest.mark.parametrize("size", [3, 8])
def test_accumulated_gradients_are_those_of_one_batch(weighting: str, size: int) -> None:
    found = []
    for rows in (size, ROWS):
        trainer, x, labels = _vector_trainer(weighting=weighting, accumulate=ROWS // size)
        trainer.model.epoch, trainer.model.epochs = 0, 1
        fill_grads(trainer, _cut(x, labels, rows))
        found.append(flat([param.grad for param in trainer.model.parameters() if param.grad is not None]))
    assert found[0].dtype == torch.float64
    # MGDA's weights follow a Gram matrix that is as exact as the gradients.
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_accumulated_gradients_are_autograds_of_the_plain_network() -> None:
    trainer, x, labels = _vector_trainer(weighting="EW", accumulate=8)
    trainer.model.epoch, trainer.model.epochs = 0, 1
    fill_grads(trainer, _cut(x, labels, 3))
    preds = trainer.model(x)
    total = sum(trainer.meter.losses[task].compute_loss(preds[task], own) for task, own in labels.items())
    params = list(trainer.model.parameters())
    for param, grad in zip(params, torch.autograd.grad(total, params), strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=1e-11, atol=1e-14)


class _Map(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.inner(features)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_a_pass_over_maps(size: int) -> None:
    x, (rows, height, width) = _draw(6, 3, 4, 5, seed=0).float(), (6, 4, 5)
    void = _draw(rows, height, width, seed=5) > torch.linspace(-1.5, 1.5, rows)[:, None, None]
    classes = torch.randint(3, (rows, height, width), generator=torch.Generator().manual_seed(0)).masked_fill(void, -1)
    depth = (_draw(rows, 1, height, width, seed=6).abs() + 0.1).float().masked_fill(void[:, None], 0)
    normal = F.normalize(_draw(rows, 3, height, width, seed=7).float(), dim=1).masked_fill(void[:, None], 0)
    tasks = {
        "segmentation": _task(SegLoss(), SegMetric(3), 2),
        "depth": _task(DepthLoss(), DepthMetric(), 2),
        "normal": _task(NormalLoss(), NormalMetric(), 5),
    }
    labels = {"segmentation": classes, "depth": depth, "normal": normal}
    decoders = nn.ModuleDict({"segmentation": _Map(3), "depth": _Map(1), "normal": _Map(3)})
    trainer = make_trainer("EW", task_dict=tasks, encoder_class=lambda: nn.Conv2d(3, 4, 1), decoders=decoders)
    trainer.test(_cut(x, labels, size))
    with torch.no_grad():
        preds = {task: pred.double() for task, pred in trainer.model(x).items()}
    cosine = (F.normalize(preds["normal"], dim=1) * normal).sum(1)[~void]
    expected = [
        F.cross_entropy(preds["segmentation"], classes, ignore_index=-1).item(),
        (preds["depth"] - depth)[~void[:, None]].abs().mean().item(),
        (1 - cosine).mean().item(),
    ]
    assert trainer.meter.loss_item == pytest.approx(expected, rel=1e-6)
    assert trainer.meter.results["depth"][0] == pytest.approx(expected[1], rel=1e-6)


class _Boxes(AbsLoss):
    """Of a list of boxes for each image; an image without any has no label."""

    def labelled(self, gt: Any) -> Tensor:
        return torch.tensor([len(boxes) > 0 for boxes in gt])

    def compute_loss(self, pred: Tensor, gt: Any) -> Tensor:
        parts = [(own - boxes.mean()).square().sum() for own, boxes in zip(pred, gt, strict=True) if len(boxes)]
        return torch.stack(parts).mean() if parts else pred.sum() * 0


class _WeighedBoxes(_Boxes):
    def divisor(self, gt: Any) -> Tensor:
        return 0.25 * self.labelled(gt).sum()


@pytest.mark.parametrize("loss", [_Boxes(), _WeighedBoxes()])
def test_lists_are_counted_by_the_loss_that_knows_them(loss: Any) -> None:
    boxes = [torch.ones(2, 4), torch.zeros(0, 4), torch.zeros(0, 4), 3 * torch.ones(1, 4), torch.ones(3, 4)]
    x = _draw(5, 6, seed=0).float()
    decoders = nn.ModuleDict({"boxes": nn.Linear(8, 1)})
    trainer = make_trainer("EW", count=1, task_dict={"boxes": _task(loss, _Count())}, decoders=decoders)
    with torch.no_grad():
        expected = loss.compute_loss(trainer.model(x)["boxes"], boxes).item()
    for cuts in ([5], [2, 3], [1, 1, 1, 1, 1]):
        ends = np.cumsum([0, *cuts])
        batches = [(x[a:b], {"boxes": boxes[a:b]}) for a, b in pairwise(ends)]
        trainer.test(batches)
        assert trainer.meter.loss_item.tolist() == pytest.approx([expected], rel=1e-6)
    assert present_tasks(trainer.meter.losses, [{"boxes": boxes[1:3]}]) == []
    assert present_tasks(trainer.meter.losses, [{"boxes": boxes[1:4]}]) is None


class _Count(AbsMetric):
    def update_fun(self, pred: Any, gt: Any) -> None:
        self.record.append(len(gt))

    def score_fun(self) -> list[float]:
        return [float(sum(self.record))]


def test_lists_that_no_loss_tells_of_count_by_what_is_in_them() -> None:
    boxes = {"boxes": torch.zeros(3, 4), "labels": torch.tensor([1, 2, 0])}
    missing = {"boxes": torch.full((1, 4), NAN), "labels": torch.tensor([-100])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    assert labelled_entries(AbsLoss(), [boxes, missing, empty, None]) == 2
    assert labelled_entries(CELoss(), [boxes, missing]) == 1
    for rows, expected in (([missing, missing], []), ([missing, empty], None), ([None], []), ([], None)):
        assert present_tasks({"task": AbsLoss()}, [{"task": rows}]) == expected
    assert present_tasks({"task": AbsLoss()}, [{"task": [torch.full((2,), NAN)]}]) == []


class _OfTensors(AbsLoss):
    """As written for tensors: each entry of a list of them is asked for by itself."""

    def labelled(self, gt: Tensor) -> Tensor:
        return gt[:, 0] != 255


def test_a_loss_that_knows_tensors_alone_is_asked_of_those_in_a_list() -> None:
    masks = [torch.tensor([[1, 2], [255, 0]]), torch.tensor([[3, 0], [4, 0], [255, 255]])]
    assert labelled_entries(_OfTensors(), masks) == 3


def test_a_mean_of_nothing_counts_for_nothing() -> None:
    mean = RunningMean()
    mean.add(torch.tensor(NAN), torch.tensor(0))
    mean.add(torch.tensor(NAN), 0)
    assert mean.weightless
    assert math.isnan(mean.value())
    mean.add(torch.tensor(3.0), torch.tensor(2))
    assert mean.value() == 3.0
    assert not mean.weightless


def _two(missing: bool) -> list[Any]:
    """Batches of the toy's two tasks; none has a label of the second if they are missing."""
    batches = list(loaders(2))
    return (
        [(x, {**labels, "task1": torch.full_like(labels["task1"], NAN)}) for x, labels in batches]
        if missing
        else batches
    )


def test_a_task_without_labels_is_shown_as_a_dash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    trainer = make_trainer("MGDA", logger=JsonlLogger(path))
    trainer.train(_two(False), _two(True), 2, val_dataloaders=_two(False))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert len(lines) == 2
    for line in lines:
        parts = line.split(" | ")
        assert [part == "- -" for part in parts] == [False] * 8 + [True, False]
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    tests = [row for row in rows if row["event"] == "epoch" and row["mode"] == "test"]
    assert [row["metric"]["task1"] for row in tests] == [{"L1": None}] * 2
    assert [row["loss"]["task1"] for row in tests] == [None] * 2
    info = RunInfo(
        task_names=trainer.task_name, metric_names={"task0": ["Acc"], "task1": ["L1"]}, epochs=3, batches_per_epoch=3,
        weighting="MGDA", architecture="HPS", device="cpu", start_epoch=2, start_batch=0, save_path=None,
    )  # fmt: skip
    history = History(info=info)
    history.read_earlier(path)
    assert math.isnan(history.results["test", 1]["task1"][0])
    assert read_jsonl(path)


def test_a_prediction_that_is_no_number_is_no_dash(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer("EW")
    with torch.no_grad():
        next(iter(trainer.model.decoders["task1"].parameters())).fill_(NAN)
    trainer.test(_two(False))
    assert capsys.readouterr().out.splitlines()[-1].split(" | ")[1] == "nan nan"


def _show(meter: Any, epoch: int, accuracy: float, error: float | None) -> None:
    """End an epoch with these scores; None for a task without labels."""
    meter.results = {"task0": [accuracy], "task1": [NAN if error is None else error]}
    meter.loss_item = np.array([1.0, NAN if error is None else error])
    meter.unlabelled = {"task1"} if error is None else set()
    meter.display("test", epoch)


def test_the_improvement_is_that_of_the_tasks_with_labels() -> None:
    meter = make_trainer("EW").meter
    _show(meter, 0, 0.5, 2.0)
    _show(meter, 1, 0.6, 1.0)
    assert meter.improvement == pytest.approx((0.2 + 0.5) / 2)
    _show(meter, 2, 0.9, None)
    # It is known of the other task, but an epoch that lacks one cannot be the best.
    assert meter.improvement == pytest.approx(0.8)
    assert meter.best_result["epoch"] == 1
    _show(meter, 3, 0.9, 1.0)
    assert meter.best_result["epoch"] == 3


def test_a_task_that_never_has_labels_is_in_nobodys_way() -> None:
    meter = make_trainer("EW").meter
    meter.base_result = {"task0": [0.5], "task1": [1.0]}
    for epoch, accuracy in enumerate((0.4, 0.6, 0.5)):
        _show(meter, epoch, accuracy, None)
    assert meter.best_result["epoch"] == 1
    assert meter.best_result["improvement"] == pytest.approx(0.2)


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    meter = make_trainer("EW").meter
    _show(meter, 0, 0.5, 1.0)
    meter.unlabelled = set()
    meter.results = {"task0": [0.9], "task1": [NAN]}
    meter.display("test", 1)
    assert math.isnan(meter.improvement)
    assert meter.best_result["epoch"] == 0


def test_labels_of_a_step_may_be_looked_at_before_they_are_on_the_device() -> None:
    trainer, x, labels = _vector_trainer()
    batch = x, labels
    trainer.model.epoch = 0
    losses, preds = trainer.step([batch], StepBuffer())
    trainer.meter.begin()
    known = {task: own.clone() for task, own in labels.items()}
    # What is only looked at decides which rows a metric of a user sees.
    known["errors"][:] = NAN
    trainer.meter.update(losses, preds[0], labels, known)
    trainer.meter.end()
    assert math.isnan(trainer.meter.results["errors"][0])
    assert not math.isnan(trainer.meter.results["binary"][0])


def test_losses_of_libmtl_and_of_all_labels_are_as_ever() -> None:
    trainer = make_trainer("EW")
    batches = list(loaders(2, batch=9))
    trainer.test(batches)
    with torch.no_grad():
        rows = [
            [float(trainer.meter.losses[task].compute_loss(trainer.model(x)[task], labels[task])) for task in labels]
            for x, labels in batches
        ]
    sizes = [len(x) for x, _ in batches]
    assert trainer.meter.loss_item == pytest.approx(np.average(rows, axis=0, weights=sizes), rel=1e-6)


@pytest.mark.parametrize("loss", [L1Loss(), MSELoss()])
def test_the_running_mean_of_a_loop_of_ones_own(loss: AbsLoss) -> None:
    pred, gt = _draw(9, 2, seed=0), _draw(9, 2, seed=1)
    gt[_draw(9, 2, seed=2) > 0] = NAN
    for rows in torch.arange(9).split(2):
        loss._update_loss(pred[rows], gt[rows])
    assert loss._average_loss() == pytest.approx(loss.compute_loss(pred, gt).item(), rel=1e-14)
