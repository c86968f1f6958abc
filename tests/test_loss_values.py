"""Losses with weights, of binary labels, focal and Huber: values by hand, in float64, and what they divide by."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss, BCELoss, CELoss, FocalLoss, HuberLoss, L1Loss, MSELoss, SegLoss
from fastmtl.trainer.setup.losses import as_loss
from tests.host_reads import NoHostRead

NAN = math.nan
WEIGHT = [0.25, 2.0, 0.5]


def _logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _softmax(row: list[float]) -> list[float]:
    whole = sum(math.exp(value) for value in row)
    return [math.exp(value) / whole for value in row]


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_weighted_cross_entropy_is_divided_by_the_weights() -> None:
    pred, gt = _logits(0, 5, 3), torch.tensor([0, 2, -100, 1, 2])
    total = weights = 0.0
    for row, label in zip(pred.tolist(), gt.tolist(), strict=True):
        if label != -100:
            total -= WEIGHT[label] * math.log(_softmax(row)[label])
            weights += WEIGHT[label]
    loss = CELoss(weight=WEIGHT)
    assert loss.compute_loss(pred, gt).item() == pytest.approx(total / weights, rel=1e-14)
    assert float(loss.divisor(gt)) == weights
    assert loss.compute_loss(pred, gt).item() == pytest.approx(
        F.cross_entropy(pred, gt, torch.tensor(WEIGHT, dtype=torch.float64)).item(), rel=1e-14
    )


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 5)], ids=["rows", "maps"])
def test_smoothed_cross_entropy(weight: list[float] | None, shape: tuple[int, ...]) -> None:
    pred = _logits(1, *shape)
    gt = torch.randint(3, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    gt.flatten()[::4] = -100
    total = divisor = 0.0
    weights = weight or [1.0] * 3
    for row, label in zip(pred.movedim(1, -1).reshape(-1, 3).tolist(), gt.flatten().tolist(), strict=True):
        if label != -100:
            logs = [math.log(each) for each in _softmax(row)]
            total -= 0.9 * weights[label] * logs[label]
            total -= 0.1 / 3 * sum(w * log for w, log in zip(weights, logs, strict=True))
            divisor += weights[label]
    loss = CELoss(weight=weight, label_smoothing=0.1)
    assert loss.compute_loss(pred, gt).item() == pytest.approx(total / divisor, rel=1e-13)
    assert float(loss.divisor(gt)) == pytest.approx(divisor, rel=1e-14)


def test_weighted_cross_entropy_of_probabilities_is_over_rows() -> None:
    pred, gt = _logits(2, 4, 3), _logits(3, 4, 3).softmax(1)
    gt[1] = NAN
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    expected = -(weight * gt * pred.log_softmax(1))[[0, 2, 3]].sum() / 3
    loss = CELoss(weight=weight)
    assert loss.compute_loss(pred, gt).item() == pytest.approx(expected.item(), rel=1e-14)
    assert loss.divisor(gt) == 3


@pytest.mark.parametrize("pos_weight", [None, 3.0, [0.5, 4.0]], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["real", "integer"])
def test_binary_cross_entropy(pos_weight: Any, whole: bool) -> None:
    pred = _logits(4, 5, 2)
    gt = torch.tensor([[1.0, 0.0], [NAN, 1.0], [0.0, NAN], [NAN, NAN], [1.0, 1.0]], dtype=torch.float64)
    total, count = 0.0, 0
    for row, labels in zip(pred.tolist(), gt.tolist(), strict=True):
        for column, (value, label) in enumerate(zip(row, labels, strict=True)):
            if not math.isnan(label):
                weight = pos_weight[column] if isinstance(pos_weight, list) else pos_weight or 1.0
                total -= weight * label * math.log(_sigmoid(value)) + (1 - label) * math.log(1 - _sigmoid(value))
                count += 1
    labels = torch.where(gt.isnan(), -100, gt.nan_to_num()).long() if whole else gt
    loss = BCELoss(pos_weight)
    assert loss.compute_loss(pred, labels).item() == pytest.approx(total / count, rel=1e-13)
    assert loss.divisor(labels) == count == 6


@pytest.mark.parametrize("alpha", [None, 0.25], ids=["plain", "balanced"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_binary_focal_loss(alpha: float | None, gamma: float) -> None:
    pred = _logits(5, 6) * 3
    gt = torch.tensor([1.0, 0.0, NAN, 1.0, 0.0, 1.0], dtype=torch.float64)
    losses = []
    for value, label in zip(pred.tolist(), gt.tolist(), strict=True):
        if not math.isnan(label):
            true = _sigmoid(value) if label else 1 - _sigmoid(value)
            factor = 1.0 if alpha is None else alpha if label else 1 - alpha
            losses.append(-factor * (1 - true) ** gamma * math.log(true))
    loss = FocalLoss(gamma, alpha)
    assert loss.compute_loss(pred, gt).item() == pytest.approx(sum(losses) / 5, rel=1e-12)
    # One logit of a column, and whole numbers, are the same labels.
    labels = torch.where(gt.isnan(), -100, gt.nan_to_num()).long()
    assert loss.compute_loss(pred[:, None], labels).item() == pytest.approx(sum(losses) / 5, rel=1e-12)


@pytest.mark.parametrize("alpha", [None, WEIGHT], ids=["plain", "balanced"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_of_several_classes(alpha: list[float] | None, gamma: float) -> None:
    pred, gt = _logits(6, 5, 3), torch.tensor([0, 2, -100, 1, 2])
    losses = []
    for row, label in zip(pred.tolist(), gt.tolist(), strict=True):
        if label != -100:
            true = _softmax(row)[label]
            losses.append(-(alpha[label] if alpha else 1.0) * (1 - true) ** gamma * math.log(true))
    loss = FocalLoss(gamma, alpha)
    assert loss.compute_loss(pred, gt).item() == pytest.approx(sum(losses) / 4, rel=1e-12)
    assert loss.divisor(gt) == 4
    assert torch.autograd.gradcheck(lambda each: loss.compute_loss(each, gt), pred.requires_grad_())


@pytest.mark.parametrize("several", [False, True], ids=["binary", "several"])
def test_focal_loss_of_certain_predictions_has_finite_gradients(several: bool) -> None:
    pred = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], requires_grad=True)
    gt = torch.tensor([0, 0]) if several else torch.tensor([[1, 0], [1, 0]])
    value = FocalLoss(gamma=0.5).compute_loss(pred, gt)
    value.backward()
    assert value.item() == pytest.approx(300.0 if several else 150.0)
    assert pred.grad.isfinite().all()


def test_huber_loss_is_linear_from_delta_on() -> None:
    pred = torch.tensor([0.5, 3.0, -2.0, 1.0], dtype=torch.float64)
    gt = torch.tensor([0.0, 0.0, 0.0, NAN], dtype=torch.float64)
    expected = (0.5**2 / 2 + 1.5 * (3 - 0.75) + 1.5 * (2 - 0.75)) / 3
    assert HuberLoss(delta=1.5).compute_loss(pred, gt).item() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("loss", "expected"), [(MSELoss(), 2.5), (L1Loss(), 1.5), (HuberLoss(9.0), 1.25)])
def test_integers_to_regress_are_values(loss: AbsLoss, expected: float) -> None:
    pred, gt = torch.tensor([-98.0, 6.0], dtype=torch.float64, requires_grad=True), torch.tensor([-100, 5])
    assert loss.divisor(gt) == 2
    value = loss.compute_loss(pred, gt)
    value.backward()
    assert value.item() == expected
    assert pred.grad.ne(0).all()


LOSSES = [
    (CELoss(weight=WEIGHT, label_smoothing=0.2), "classes"),
    (CELoss(weight=[0.01, 0.02, 0.0]), "classes"),
    (BCELoss(pos_weight=[1.0, 0.3, 2.0]), "binary"),
    (FocalLoss(alpha=0.25), "binary"),
    (FocalLoss(alpha=WEIGHT), "classes"),
    (HuberLoss(0.5), "real"),
]


def _labels(kind: str, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    missing = torch.rand(rows, 3, generator=generator) < 0.4
    if kind == "classes":
        return torch.randint(3, (rows,), generator=generator).where(~missing[:, 0], -100)
    real = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return (real > 0).double().where(~missing, NAN) if kind == "binary" else real.where(~missing, NAN)


@pytest.mark.parametrize(("loss", "kind"), LOSSES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 6]], ids=str)
def test_parts_add_up_to_the_whole(loss: AbsLoss, kind: str, sizes: list[int]) -> None:
    pred, gt = _logits(8, 12, 3).requires_grad_(), _labels(kind, 12)
    whole = loss.compute_loss(pred, gt)
    divisor = float(loss.divisor(gt))
    parts = sum(
        loss.compute_loss(part, labels) * (float(loss.divisor(labels)) / divisor)
        for part, labels in zip(pred.split(sizes), gt.split(sizes), strict=True)
    )
    assert parts.item() == pytest.approx(whole.item(), rel=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(parts, pred), torch.autograd.grad(whole, pred), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize(("loss", "kind"), LOSSES, ids=lambda value: type(value).__name__)
class TestLosses:
    def test_missing_labels_do_not_count_and_nothing_waits(self, loss: AbsLoss, kind: str) -> None:
        pred, gt = _logits(9, 8, 3).requires_grad_(), _labels(kind, 8)
        gone = torch.full_like(gt, -100 if kind == "classes" else NAN)
        with NoHostRead():
            value = loss.compute_loss(torch.cat([pred, pred]), torch.cat([gt, gone]))
            none = loss.compute_loss(pred, gone)
            loss.divisor(gt)
        assert value.item() == pytest.approx(loss.compute_loss(pred, gt).item(), rel=1e-13)
        assert none.item() == 0
        assert not torch.autograd.grad(none, pred)[0].any()

    def test_compiles_whole(self, loss: AbsLoss, kind: str) -> None:
        pred, gt = _logits(10, 8, 3), _labels(kind, 8)
        compiled = torch.compile(loss.compute_loss, fullgraph=True, backend="eager")
        assert torch.equal(compiled(pred, gt), loss.compute_loss(pred, gt))

    def test_copies_and_other_dtypes(self, loss: AbsLoss, kind: str) -> None:
        pred, gt = _logits(11, 8, 3).float(), _labels(kind, 8)
        gt = gt.float() if gt.is_floating_point() else gt
        value = copy.deepcopy(loss).compute_loss(pred, gt)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss.compute_loss(pred.double(), gt).item(), rel=1e-5)


def test_a_class_that_tells_more_labels_are_missing_is_heard() -> None:
    class NoTwos(CELoss):
        def labelled(self, gt: Tensor) -> Tensor:
            return super().labelled(gt) & (gt != 2)

    pred, gt = _logits(0, 5, 3), torch.tensor([0, 2, 1, -100, 2])
    assert NoTwos().compute_loss(pred, gt).item() == CELoss().compute_loss(pred[[0, 2]], gt[[0, 2]]).item()
    weighted = NoTwos(weight=WEIGHT).compute_loss(pred, gt).item()
    assert weighted == pytest.approx(CELoss(weight=WEIGHT).compute_loss(pred[[0, 2]], gt[[0, 2]]).item(), rel=1e-14)


@pytest.mark.parametrize("label", [3, -1])
def test_labels_of_no_class_are_refused(label: int) -> None:
    pred, gt = _logits(0, 2, 3), torch.tensor([0, label])
    with pytest.raises(UsageError, match=rf"labels must be from 0 to 2 .*\(2, 3\).*-100.*Target {label}"):
        CELoss().compute_loss(pred, gt)
    with pytest.raises(UsageError, match=rf"SegLoss: labels must be from 0 to 2 .*Target {label}"):
        SegLoss(ignore_index=255).compute_loss(pred, gt.float())


def test_weights_are_copied_to_a_device_once() -> None:
    loss = CELoss(weight=WEIGHT)
    there = torch.empty(2, 3, device="meta")
    first = loss.weight.on(there.device)
    assert first.device.type == "meta"
    assert loss.weight.on(there.device) is first
    assert loss.weight.of(_logits(0, 2, 3)).tolist() == WEIGHT


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CELoss(weight=[1.0, -1.0]), r"weight must be a vector .* got \[1.0, -1.0\]"),
        (lambda: CELoss(weight=torch.ones(1, 2)), "weight must be a vector"),
        (lambda: CELoss(weight=[0.0, 0.0]), "weight must be above 0 for some class"),
        (lambda: CELoss(label_smoothing=1.5), "label_smoothing must be from 0 to 1, got 1.5"),
        (lambda: BCELoss(pos_weight=NAN), "pos_weight must be a vector of finite numbers"),
        (lambda: FocalLoss(gamma=-1.0), "gamma must be a finite number of at least 0, got -1.0"),
        (lambda: FocalLoss(alpha=2.0), "alpha must be from 0 to 1"),
        (lambda: HuberLoss(delta=0.0), "delta must be a finite number above 0, got 0.0"),
        (lambda: CELoss(weight=WEIGHT).compute_loss(torch.ones(2, 4), torch.tensor([0, 1])), r"3 numbers.*\(2, 4\)"),
        (lambda: BCELoss([1.0, 2.0]).compute_loss(torch.ones(2, 3), torch.ones(2, 3)), r"2 numbers.*\(2, 3\)"),
        (lambda: FocalLoss(alpha=0.3).compute_loss(torch.ones(2, 3), torch.tensor([0, 1])), r"per class.*\(2, 3\)"),
        (lambda: FocalLoss(alpha=WEIGHT).compute_loss(torch.ones(2, 3), torch.ones(2, 3)), r"one number.*\(2, 3\)"),
    ],
)
def test_arguments_are_checked(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 4.0]], ids=str)
def test_smoothed_probabilities_that_are_missing_count_for_nothing(weight: list[float] | None) -> None:
    pred, gt = _logits(3, 4, 3).requires_grad_(), _logits(4, 4, 3).softmax(1)
    part = pred.detach()[:2].requires_grad_()
    expected = F.cross_entropy(
        part, gt[:2], weight=None if weight is None else torch.tensor(weight).to(part), label_smoothing=0.3
    )
    gt[2:] = math.nan
    loss = CELoss(weight=weight, label_smoothing=0.3)
    loss.compute_loss(pred, gt).backward()
    torch.testing.assert_close(loss.compute_loss(pred, gt), expected)
    (grad,) = torch.autograd.grad(expected, part)
    assert pred.grad is not None
    torch.testing.assert_close(pred.grad[:2], grad)
    assert not pred.grad[2:].any()
    assert loss.compute_loss(pred, torch.full_like(gt, math.nan)).item() == 0


@pytest.mark.parametrize("label", [-1, 3])
def test_focal_loss_refuses_labels_of_no_class(label: int) -> None:
    with pytest.raises(UsageError, match="FocalLoss: labels must be from 0 to 2"):
        FocalLoss().compute_loss(_logits(0, 2, 3), torch.tensor([0, label]))


def test_small_integers_are_the_classes_they_say() -> None:
    pred = _logits(0, 4, 200)
    gt = torch.tensor([156, 3, 199, 0])
    for loss in (CELoss(), FocalLoss(gamma=0.0)):
        assert int(loss.divisor(gt.to(torch.uint8))) == 4
        torch.testing.assert_close(loss.compute_loss(pred, gt.to(torch.uint8)), F.cross_entropy(pred, gt))
    maps, pixels = _logits(0, 1, 3, 1, 2), torch.tensor([[[1, 255]]], dtype=torch.uint8)
    expected = F.cross_entropy(maps[..., 0], pixels[..., 0].long())
    torch.testing.assert_close(SegLoss(ignore_index=255).compute_loss(maps, pixels), expected)
    with pytest.raises(UsageError, match="SegLoss: labels must be from 0 to 2"):
        SegLoss().compute_loss(maps, pixels)


def test_one_hot_labels_that_are_integers_are_told_what_to_become() -> None:
    pred, gt = _logits(0, 2, 3), torch.tensor([[1, 0, 0], [0, 0, 1]])
    with pytest.raises(UsageError, match=r"CELoss: labels of shape \(2, 3\).* torch.int64: pass labels.float"):
        CELoss().compute_loss(pred, gt)
    torch.testing.assert_close(CELoss().compute_loss(pred, gt.double()), CELoss().compute_loss(pred, gt.argmax(1)))


def test_weights_of_torchs_loss_and_small_integers() -> None:
    loss = as_loss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)), "loss_fn")
    pred, gt = _logits(0, 3, 3), torch.tensor([2, 0, 2], dtype=torch.uint8)
    assert float(loss.divisor(gt)) == 9
    torch.testing.assert_close(loss.compute_loss(pred, gt), loss.compute_loss(pred, gt.long()))
