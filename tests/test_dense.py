"""Losses and metrics of segmentation, depth and normals, beside plain numpy; and F1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmtl import loss as losses
from fastmtl import metrics
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss, DepthLoss, NormalLoss, SegLoss
from fastmtl.metrics import AbsMetric, DepthMetric, F1Metric, NormalMetric, SegMetric, TorchMetric
from fastmtl.model._torchvision import import_torchvision
from tests.host_reads import NoHostRead
from tests.libmtl import checkout

CLASSES = 5
SIZE = (6, 7)


def _segmentation(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    gt = torch.randint(-1, CLASSES, (rows, *SIZE), generator=generator).float()
    return torch.randn(rows, CLASSES, *SIZE, generator=generator), gt


def _depth(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    gt = torch.rand(rows, 1, *SIZE, generator=generator) + 0.5
    gt[torch.rand(gt.shape, generator=generator) < 0.3] = 0
    return torch.randn(gt.shape, generator=generator), gt


def _normal(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    gt = torch.nn.functional.normalize(torch.randn(rows, 3, *SIZE, generator=generator), dim=1)
    gt *= (torch.rand(rows, 1, *SIZE, generator=generator) > 0.3).float()
    return gt + 0.7 * torch.randn(gt.shape, generator=generator), gt


MAKERS = {"segmentation": _segmentation, "depth": _depth, "normal": _normal}
LOSSES: dict[str, type[AbsLoss]] = {"segmentation": SegLoss, "depth": DepthLoss, "normal": NormalLoss}


def _metric(task: str) -> AbsMetric:
    return {"segmentation": SegMetric(CLASSES), "depth": DepthMetric(), "normal": NormalMetric()}[task]


def _batches(task: str, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [MAKERS[task](generator, rows) for rows in (4, 3, 1)]


def _numpy_loss(task: str, pred: np.ndarray, gt: np.ndarray) -> float:
    if task == "segmentation":
        log_probs = pred - np.log(np.exp(pred).sum(1, keepdims=True))
        valid = gt >= 0
        chosen = np.take_along_axis(log_probs, np.maximum(gt, 0).astype(int)[:, None], 1)[:, 0]
        return float(-chosen[valid].mean())
    if task == "depth":
        return float(np.abs(pred - gt)[gt != 0].mean())
    valid = (gt != 0).any(1)
    return float((1 - (pred / np.linalg.norm(pred, axis=1, keepdims=True) * gt).sum(1))[valid].mean())


def _numpy_scores(task: str, pred: np.ndarray, gt: np.ndarray) -> list[float]:
    if task == "segmentation":
        chosen = pred.argmax(1)[gt >= 0]
        gt = gt[gt >= 0]
        ious = [((chosen == c) & (gt == c)).sum() / ((chosen == c) | (gt == c)).sum() for c in range(CLASSES)]
        return [float(np.mean(ious)), float((chosen == gt).mean())]
    if task == "depth":
        error, true = np.abs(pred - gt)[gt != 0], gt[gt != 0]
        return [float(error.mean()), float((error / true).mean())]
    valid = (gt != 0).any(1)
    cosine = (pred / np.linalg.norm(pred, axis=1, keepdims=True) * gt).sum(1)[valid]
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return [angle.mean(), float(np.median(angle)), *((angle < limit).mean() for limit in (11.25, 22.5, 30))]


@pytest.mark.parametrize("task", MAKERS)
def test_losses_count_what_is_labelled(task: str) -> None:
    for pred, gt in _batches(task):
        pred = pred.double().requires_grad_()
        with NoHostRead():
            value = LOSSES[task]().compute_loss(pred, gt.double())
        assert value.item() == pytest.approx(_numpy_loss(task, pred.detach().numpy(), gt.double().numpy()), rel=1e-12)
        value.backward()
        assert torch.isfinite(pred.grad).all()


@pytest.mark.parametrize("task", MAKERS)
def test_losses_without_any_label_are_zero(task: str) -> None:
    pred, gt = _batches(task)[0]
    pred.requires_grad_()
    value = LOSSES[task]().compute_loss(pred, torch.full_like(gt, -1.0 if task == "segmentation" else 0.0))
    value.backward()
    assert value.item() == 0
    assert torch.count_nonzero(pred.grad) == 0


@pytest.mark.parametrize("task", MAKERS)
def test_metrics_are_of_all_batches_together(task: str) -> None:
    metric = _metric(task)
    for seed in (0, 1):
        batches = _batches(task, seed)
        with NoHostRead():
            for pred, gt in batches:
                metric.update_fun(pred, gt)
        whole = [torch.cat(each).double().numpy() for each in zip(*batches, strict=True)]
        # The median is counted in steps of 180 / 2^20 degrees.
        assert metric.score_fun() == pytest.approx(_numpy_scores(task, whole[0], whole[1]), rel=1e-5, abs=1e-4)
        metric.reinit()


@pytest.mark.parametrize("task", MAKERS)
def test_metrics_without_batches_are_an_error_and_without_labels_nan(task: str) -> None:
    metric = _metric(task)
    with pytest.raises(UsageError, match="empty"):
        metric.score_fun()
    pred, gt = _batches(task)[0]
    metric.update_fun(pred, torch.full_like(gt, -1.0 if task == "segmentation" else 0.0))
    assert all(math.isnan(score) for score in metric.score_fun())


@pytest.mark.parametrize("rows", [1, 2])
def test_median_of_few_angles(rows: int) -> None:
    metric = NormalMetric()
    angles = torch.tensor([0.2, 0.9])[:rows]
    pred = torch.stack([angles.sin(), angles.cos(), torch.zeros(rows)], 1).reshape(rows, 3, 1, 1)
    gt = torch.tensor([0.0, 1.0, 0.0]).expand(rows, 3).reshape(rows, 3, 1, 1)
    metric.update_fun(pred, gt)
    assert metric.score_fun()[:2] == pytest.approx([math.degrees(angles.mean().item())] * 2, abs=2e-4)


def test_absent_classes_are_left_out_of_the_mean() -> None:
    metric = SegMetric(4)
    pred = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1]]), 4).movedim(-1, 1).float()
    metric.update_fun(pred, torch.tensor([[0, 1, 0]]))
    assert metric.score_fun() == pytest.approx([0.5, 2 / 3])


def test_wrong_number_of_channels() -> None:
    with pytest.raises(UsageError, match=r"13 classes.*got shape \(2, 5, 3\)"):
        SegMetric().update_fun(torch.zeros(2, 5, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("average", ["macro", "micro", "binary"])
@pytest.mark.filterwarnings("ignore")
def test_f1_is_that_of_torchmetrics(average: str) -> None:
    # torchmetrics imports torchvision, which beside a CPU torch needs help.
    import_torchvision()
    from torchmetrics.classification import BinaryF1Score, MulticlassF1Score

    classes = 2 if average == "binary" else 6
    generator = torch.Generator().manual_seed(0)
    metric = F1Metric(classes, average)
    theirs = BinaryF1Score() if average == "binary" else MulticlassF1Score(classes, average=average, ignore_index=-1)
    for _ in range(3):
        pred = torch.randn(20, classes, generator=generator)
        # The last class of several neither occurs nor is predicted.
        pred[:, classes - 1] -= 100 * (classes > 2)
        gt = torch.randint(-1 if classes > 2 else 0, max(classes - 1, 2), (20,), generator=generator)
        with NoHostRead():
            metric.update_fun(pred, gt)
        theirs.update(pred.argmax(1) if classes == 2 else pred, gt)
    assert metric.score_fun() == pytest.approx([theirs.compute().item()], rel=1e-6)


def test_f1_of_no_right_prediction_is_zero() -> None:
    metric = F1Metric(2, "binary")
    metric.update_fun(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert metric.score_fun() == [0.0]


@pytest.mark.parametrize(("classes", "average"), [(3, "binary"), (3, "mean"), (1, "macro")])
def test_f1_arguments_are_checked(classes: int, average: str) -> None:
    with pytest.raises(UsageError, match=r"average|num_classes"):
        F1Metric(classes, average)


@pytest.mark.filterwarnings("ignore")
def test_a_metric_of_torchmetrics_works() -> None:
    import_torchvision()
    from torchmetrics.classification import MulticlassAccuracy

    metric, ours = TorchMetric(MulticlassAccuracy(4, average="micro")), metrics.AccMetric()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        metric.reinit()
        ours.reinit()
        for rows in (5, 2):
            batch = torch.randn(rows, 4, generator=generator), torch.randint(4, (rows,), generator=generator)
            metric.update_fun(*batch)
            ours.update_fun(*batch)
        assert metric.score_fun() == pytest.approx(ours.score_fun())


@pytest.mark.parametrize(
    ("module", "name", "answer"),
    [(losses, "CE_loss_fn", r"CELoss\(\)"), (metrics, "acc_update_fun", r"AccMetric\(\)")],
    ids=["loss", "metric"],
)
def test_former_names_are_answered_with_the_new_ones(module: Any, name: str, answer: str) -> None:
    with pytest.raises(UsageError, match=answer):
        getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.libmtl
@pytest.mark.parametrize("task", MAKERS)
def test_classes_written_for_libmtl_work_and_agree(task: str) -> None:
    source = (checkout() / "examples" / "nyu" / "utils.py").read_text().replace("from LibMTL", "from fastmtl")
    names: dict[str, Any] = {}
    exec(source, names)
    word = {"segmentation": "Seg", "depth": "Depth", "normal": "Normal"}[task]
    ours, theirs = _metric(task), names[f"{word}Metric"](*([CLASSES] if task == "segmentation" else []))
    our_loss, their_loss = LOSSES[task](), names[f"{word}Loss"]()
    batches, found = _batches(task), []
    for pred, gt in batches:
        found.append(their_loss._update_loss(pred, gt).item())
        assert our_loss._update_loss(pred, gt).item() == pytest.approx(found[-1], rel=1e-6)
        ours.update_fun(pred, gt)
        theirs.update_fun(pred, gt)
    # Theirs does not tell which pixels count; ours is that of all of them together.
    assert their_loss._average_loss() == pytest.approx(np.average(found, weights=[len(gt) for _, gt in batches]))
    pooled = our_loss.compute_loss(*(torch.cat(each) for each in zip(*batches, strict=True))).item()
    assert our_loss._average_loss() == pytest.approx(pooled, rel=1e-6)
    assert ours.score_fun() == pytest.approx([float(score) for score in theirs.score_fun()], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("task", ["depth", "normal"])
def test_a_wrong_prediction_is_not_hidden(task: str) -> None:
    metric = _metric(task)
    pred, gt = _batches(task)[0]
    unknown = (gt == 0).all(1, keepdim=True)
    metric.update_fun(pred.masked_fill(unknown, math.nan), gt)
    assert math.isfinite(metric.score_fun()[0])
    metric.update_fun(pred.masked_fill(~unknown, math.nan), gt)
    assert math.isnan(metric.score_fun()[0])
