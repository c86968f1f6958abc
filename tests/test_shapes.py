"""Predictions and labels that torch would broadcast: brought to one shape where there is one reading, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.loss import (
    BCELoss,
    CELoss,
    DepthLoss,
    FocalLoss,
    HuberLoss,
    KLDivLoss,
    L1Loss,
    MSELoss,
    NormalLoss,
    SegLoss,
)
from fastmtl.metrics import AbsMetric, AccMetric, DepthMetric, F1Metric, L1Metric, NormalMetric, SegMetric, TorchMetric
from fastmtl.model._torchvision import import_torchvision

ENTRIES = [MSELoss(), L1Loss(), HuberLoss(), BCELoss(pos_weight=2.0), FocalLoss(), KLDivLoss(), DepthLoss()]


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _mean_absolute_error() -> TorchMetric:
    import_torchvision()
    from torchmetrics.regression import MeanAbsoluteError

    return TorchMetric(MeanAbsoluteError())


def _score(metric: AbsMetric, pred: Any, gt: Any) -> list[float]:
    metric.reinit()
    metric.update_fun(pred, gt)
    return metric.score_fun()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((4, 1), (4,)),
        ((4,), (4, 1)),
        ((4, 1, 2, 3), (4, 2, 3)),
        ((4, 2, 3), (4, 1, 2, 3)),
        ((4, 2, 1), (4, 2)),
        ((1, 1), (1,)),
        ((4, 1, 1), (4,)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
class TestEntries:
    @pytest.mark.parametrize("loss", ENTRIES, ids=lambda loss: type(loss).__name__)
    def test_of_losses(self, loss: Any, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        pred, gt = _draw(*one), _draw(*one).sigmoid().flip(0)
        expected = loss.compute_loss(pred.flatten(), gt.flatten())
        torch.testing.assert_close(loss.compute_loss(pred, gt.reshape(other)), expected, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("metric", [L1Metric(), DepthMetric(), _mean_absolute_error()])
    def test_of_metrics(self, metric: AbsMetric, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        pred, gt = _draw(*one), _draw(*one).sigmoid().flip(0)
        expected = (pred - gt).abs().mean().item()
        assert _score(metric, pred, gt.reshape(other))[0] == pytest.approx(expected, rel=1e-6)


REFUSED = [((4, 2), (4,)), ((4, 1), (1, 4)), ((4, 1), (4, 2)), ((4,), (2,)), ((4, 2, 3), (4, 3, 2)), ((4, 3), (3,))]


@pytest.mark.parametrize(("one", "other"), REFUSED, ids=str)
@pytest.mark.filterwarnings("ignore")
class TestRefusedEntries:
    @pytest.mark.parametrize("loss", ENTRIES, ids=lambda loss: type(loss).__name__)
    def test_of_losses(self, loss: Any, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        with pytest.raises(UsageError) as caught:
            loss.compute_loss(_draw(*one), _draw(*other).sigmoid())
        for word in (str(one), str(other), type(loss).__name__):
            assert word in str(caught.value)

    @pytest.mark.parametrize("metric", [L1Metric(), DepthMetric(), _mean_absolute_error()])
    def test_of_metrics(self, metric: AbsMetric, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        with pytest.raises(UsageError) as caught:
            _score(metric, _draw(*one), _draw(*other))
        assert str(one) in str(caught.value)
        assert str(other) in str(caught.value)


@pytest.mark.parametrize("shape", [(6,), (2, 4, 5)], ids=str)
@pytest.mark.parametrize("place", [1, -1])
def test_class_labels_with_a_dimension_of_one(shape: tuple[int, ...], place: int) -> None:
    pred = _draw(shape[0], 3, *shape[1:])
    gt = torch.randint(3, shape, generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(pred, gt)
    losses = [CELoss(), SegLoss(), FocalLoss(gamma=0)]
    for loss in losses:
        torch.testing.assert_close(loss.compute_loss(pred, gt.unsqueeze(place)), expected, rtol=1e-14, atol=0)
    right = (pred.argmax(1) == gt).double().mean().item()
    for metric in (AccMetric(), F1Metric(3, "micro")):
        assert _score(metric, pred, gt.unsqueeze(place)) == pytest.approx([right], rel=1e-14)
    assert _score(SegMetric(3), pred, gt.unsqueeze(place))[1] == pytest.approx(right, rel=1e-14)


@pytest.mark.parametrize("make", [CELoss, SegLoss, FocalLoss], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("pred", "gt"), [((4, 3), (4, 2)), ((4, 3), (3,)), ((4, 3, 2, 2), (4, 2)), ((4, 3), (4, 1, 1)), ((4, 3), (2, 1))]
)
def test_other_class_labels_are_refused(make: Any, pred: tuple[int, ...], gt: tuple[int, ...]) -> None:
    labels = torch.zeros(gt, dtype=torch.long)
    metrics = [AccMetric(), F1Metric(3), SegMetric(3)]
    for use in [make().compute_loss, *(metric.update_fun for metric in metrics)]:
        with pytest.raises(UsageError) as caught:
            use(_draw(*pred), labels)
        assert str(pred) in str(caught.value)
        assert str(gt) in str(caught.value)


def test_one_logit_is_no_class() -> None:
    for use in (CELoss().compute_loss, SegLoss().compute_loss, AccMetric().update_fun):
        with pytest.raises(UsageError, match=r"at least two classes, got shape \(4, 1\).*BCELoss"):
            use(_draw(4, 1), torch.tensor([0, 1, 1, 0]))


def test_class_labels_that_are_real_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(4,\).*float64.*integers.*\(4, 3\)"):
        CELoss().compute_loss(_draw(4, 3), torch.zeros(4, dtype=torch.float64))


def test_accuracy_reads_classes_in_the_last_place_or_the_second() -> None:
    gt = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
    logits = F.one_hot(gt, 3).double()
    assert _score(AccMetric(), logits, gt) == [1.0]
    assert _score(AccMetric(), logits.movedim(-1, 1), gt) == [1.0]


@pytest.mark.parametrize(
    ("pred", "gt"), [((2, 3, 4, 4), (2, 4, 4)), ((2, 4, 4, 3), (2, 4, 4, 3)), ((2, 3, 4, 4), (2, 1, 4, 4))], ids=str
)
def test_normals_have_three_channels(pred: tuple[int, ...], gt: tuple[int, ...]) -> None:
    for use in (NormalLoss().compute_loss, NormalMetric().update_fun):
        with pytest.raises(UsageError) as caught:
            use(_draw(*pred), _draw(*gt))
        assert str(pred) in str(caught.value)
        assert str(gt) in str(caught.value)


def test_depth_of_pixels_without_a_channel() -> None:
    gt = _draw(2, 4, 5).abs()
    gt[0, :2] = 0
    pred = gt + 0.5
    assert DepthLoss().compute_loss(pred[:, None], gt).item() == pytest.approx(0.5, rel=1e-14)
    assert DepthLoss().divisor(gt) == 30
    assert _score(DepthMetric(), pred, gt[:, None])[0] == pytest.approx(0.5, rel=1e-14)


@pytest.mark.filterwarnings("ignore")
def test_shapes_for_torchmetrics() -> None:
    import_torchvision()
    from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

    pred, gt = torch.tensor([[2.0], [-1.0], [3.0]]), torch.tensor([1, 1, 1])
    assert _score(TorchMetric(BinaryAccuracy()), pred, gt) == pytest.approx([2 / 3])
    classes = torch.tensor([[0], [1], [2]])
    accuracy = TorchMetric(MulticlassAccuracy(3, average="micro"))
    assert _score(accuracy, 5 * torch.eye(3), classes) == [1.0]
    with pytest.raises(UsageError, match=r"MulticlassAccuracy .* shapes \(3, 3\) and \(2,\)"):
        accuracy.update_fun(torch.eye(3), gt[:2])


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(UsageError, match="MSELoss takes tensors, but the predictions are of type tuple"):
        MSELoss().compute_loss((_draw(3), _draw(3)), _draw(3))
    with pytest.raises(UsageError, match="CELoss takes tensors, but the labels are of type list"):
        CELoss().compute_loss(_draw(3, 3), [0, 1, 2])


@pytest.mark.parametrize("loss", [MSELoss(), BCELoss(), FocalLoss()], ids=lambda loss: type(loss).__name__)
def test_shapes_are_brought_together_inside_compiled_code(loss: Any) -> None:
    pred, gt = _draw(4, 1), _draw(4).sigmoid()
    compiled = torch.compile(loss.compute_loss, fullgraph=True, backend="eager")
    assert compiled(pred, gt).item() == pytest.approx(loss.compute_loss(pred[:, 0], gt).item(), rel=1e-14)
