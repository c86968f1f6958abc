"""Areas under the ROC curve and log loss, against torchmetrics and by their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastmtl.errors import UsageError
from fastmtl.loss import BCELoss, FirstColumn
from fastmtl.metrics import AUCMetric, GAUCMetric, LogLossMetric
from fastmtl.model._torchvision import import_torchvision
from tests.host_reads import NoHostRead


def _batches(ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(500, 1, generator=generator)
    gt = (pred.squeeze(1) + torch.randn(500, generator=generator) > 0.5).float()
    return (pred * 3).round() / 3 if ties else pred, gt


def _scored(metric: Any, pred: torch.Tensor, gt: torch.Tensor, size: int = 64) -> float:
    metric.reinit()
    for begin in range(0, len(pred), size):
        metric.update_fun(pred[begin : begin + size], gt[begin : begin + size])
    return float(metric.score_fun()[0])


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_that_of_torchmetrics(ties: bool) -> None:
    import_torchvision()
    from torchmetrics.functional.classification import binary_auroc

    pred, gt = _batches(ties)
    want = float(binary_auroc(pred.squeeze(1).sigmoid(), gt.long()))
    assert _scored(AUCMetric(), pred, gt) == pytest.approx(want, abs=1e-6)
    assert _scored(AUCMetric(bins=2**14), pred, gt) == pytest.approx(want, abs=1e-4)
    # By its definition.
    ones, zeros = pred[gt == 1], pred[gt == 0].squeeze(1)
    pairs = (ones > zeros).double() + (ones == zeros).double() / 2
    assert _scored(AUCMetric(), pred, gt) == pytest.approx(float(pairs.mean()), abs=1e-9)


@pytest.mark.parametrize("bins", [None, 100])
def test_auc_leaves_out_what_is_missing(bins: int | None) -> None:
    pred, gt = torch.tensor([0.1, 2.0, -1.0, 5.0, 5.0]), torch.tensor([0.0, 1.0, 0.0, torch.nan, -1.0])
    assert _scored(AUCMetric(bins), pred, gt) == 1
    assert math.isnan(_scored(AUCMetric(bins), pred[:1], gt[:1]))
    with pytest.raises(UsageError, match="labels 0 and 1, got 1 others"):
        _scored(AUCMetric(bins), pred, torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0]))
    with pytest.raises(UsageError, match="no batch to score"):
        AUCMetric(bins).score_fun()
    with pytest.raises(UsageError, match="bins must be at least 2"):
        AUCMetric(bins=1)


@pytest.mark.parametrize("bins", [None, 100])
def test_auc_of_predictions_that_are_nan(bins: int | None) -> None:
    pred, gt = torch.tensor([0.1, 2.0, torch.nan]), torch.tensor([0.0, 1.0, 1.0])
    assert math.isnan(_scored(AUCMetric(bins), pred, gt))
    assert math.isnan(_scored(AUCMetric(bins), pred, gt, size=2))
    # It has no label.
    assert _scored(AUCMetric(bins), pred, torch.tensor([0.0, 1.0, -1.0])) == 1


def test_auc_in_the_precision_of_the_predictions() -> None:
    gt = torch.tensor([0.0, 1.0])
    # One number in float32.
    assert _scored(AUCMetric(), torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64), gt) == 1
    # Logits of bfloat16 whose sigmoids in bfloat16 are one number.
    assert _scored(AUCMetric(bins=2**14), torch.tensor([7.0, 7.5], dtype=torch.bfloat16), gt) == 1


@pytest.mark.parametrize("metric", [AUCMetric(), AUCMetric(bins=64), LogLossMetric()])
def test_updates_read_nothing_on_the_host(metric: Any) -> None:
    pred, gt = _batches(False)
    with NoHostRead():
        metric.update_fun(pred, gt)


def test_log_loss() -> None:
    pred, gt = _batches(False)
    gt[3] = torch.nan
    known = ~gt.isnan()
    want = F.binary_cross_entropy_with_logits(pred[known].squeeze(1).double(), gt[known].double())
    assert _scored(LogLossMetric(), pred, gt) == pytest.approx(float(want), rel=1e-6)
    soft = torch.where(known, gt * 0.5 + 0.25, -1.0)
    want = F.binary_cross_entropy_with_logits(pred[known].squeeze(1).double(), soft[known].double())
    assert _scored(LogLossMetric(), pred, soft) == pytest.approx(float(want), rel=1e-6)
    with pytest.raises(UsageError, match="no batch to score"):
        LogLossMetric().score_fun()


@pytest.mark.parametrize("label", [2.0, 1.01, -0.5])
def test_log_loss_refuses_labels_that_are_no_probabilities(label: float) -> None:
    with pytest.raises(UsageError, match="LogLossMetric needs labels from 0 to 1, got 2 others"):
        _scored(LogLossMetric(), torch.zeros(3), torch.tensor([label, 1.0, label]))


def test_log_loss_of_half_precision_is_computed_in_float32() -> None:
    pred, gt = torch.tensor([1.0, -3.0], dtype=torch.bfloat16), torch.tensor([1.0, 0.3])
    want = F.binary_cross_entropy_with_logits(pred.double(), gt.double())
    assert _scored(LogLossMetric(), pred, gt) == pytest.approx(float(want), rel=1e-6)


def test_gauc_is_the_mean_of_the_users_areas() -> None:
    pred = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 0.1, 9.0])
    # The first user's order is right but for one pair, the second's is wrong, the third has one kind of labels.
    labels = torch.tensor([[0, 7], [1, 7], [0, 7], [1, 7], [0, 3], [1, 3], [1, 5]]).double()
    assert _scored(GAUCMetric(), pred[:, None], labels, size=3) == pytest.approx((4 * 0.75 + 2 * 0.0) / 6)
    assert math.isnan(_scored(GAUCMetric(), pred[6:], labels[6:]))
    with pytest.raises(UsageError, match=r"labels \(n, 2\)"):
        GAUCMetric().update_fun(pred, labels[:, 0])
    with pytest.raises(UsageError, match="no batch to score"):
        GAUCMetric().score_fun()


def test_gauc_of_predictions_that_are_nan() -> None:
    pred, labels = torch.tensor([0.0, 1.0, torch.nan]), torch.tensor([[0, 1], [1, 1], [1, 1]]).double()
    assert math.isnan(_scored(GAUCMetric(), pred, labels))
    labels[2, 0] = torch.nan
    assert _scored(GAUCMetric(), pred, labels) == 1


def test_gauc_refuses_labels_that_are_not_0_or_1() -> None:
    labels = torch.tensor([[0.0, 1.0], [2.0, 1.0], [-1.0, 1.0]])
    with pytest.raises(UsageError, match="GAUCMetric needs labels 0 and 1, got 1 others"):
        _scored(GAUCMetric(), torch.zeros(3), labels)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53), (torch.int64, 53)], ids=str)
def test_gauc_refuses_users_that_their_dtype_cannot_tell_apart(dtype: torch.dtype, bits: int) -> None:
    pred = torch.tensor([0.0, 1.0, 3.0, 2.0])
    labels = torch.tensor([[0, 2**bits - 2], [1, 2**bits - 2], [0, 2**bits - 1], [1, 2**bits - 1]]).to(dtype)
    assert _scored(GAUCMetric(), pred, labels) == 0.5
    labels[2:, 1] += 2
    with pytest.raises(UsageError, match="too large for their dtype"):
        _scored(GAUCMetric(), pred, labels)


def test_a_loss_of_the_first_column() -> None:
    pred, gt = _batches(False)
    labels = torch.stack([gt.double(), torch.arange(500).double()], 1)
    labels[2, 0] = torch.nan
    loss = FirstColumn(BCELoss(pos_weight=3.0))
    torch.testing.assert_close(
        loss.compute_loss(pred, labels), BCELoss(pos_weight=3.0).compute_loss(pred, labels[:, 0].float())
    )
    assert loss.labelled(labels)[2].tolist() == [False, False]
    assert int(loss.labelled(labels).sum()) == 2 * 499
    with pytest.raises(UsageError, match=r"labels \(n, columns\), got shape \(500,\)"):
        loss.compute_loss(pred, gt)
