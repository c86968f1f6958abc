"""Small batches that the meter keeps for a while give the losses and scores of batches taken one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss, BCELoss, CELoss, L1Loss, MSELoss
from fastmtl.metrics import AbsMetric, AccMetric, F1Metric, L1Metric
from fastmtl.trainer.log.batches import BatchQueue
from fastmtl.trainer.log.meter import PerformanceMeter

SIZES = (8,) * 70 + (8, 5, 5, 3)


def _meter(**changed: Any) -> PerformanceMeter:
    losses = {"acc": CELoss(), "weighted": CELoss(weight=[1, 2, 0]), "l1": L1Loss(), "f1": CELoss(), "two": BCELoss()}
    metrics = {"acc": AccMetric(), "weighted": AccMetric(), "l1": L1Metric(), "f1": F1Metric(3), "two": L1Metric()}
    losses |= changed.get("losses", {})
    metrics |= changed.get("metrics", {})
    return PerformanceMeter(
        {
            task: {"metrics": ["m"], "metrics_fn": metrics[task], "loss_fn": losses[task], "weight": [1]}
            for task in losses
        }
    )


def _batches(meter: PerformanceMeter) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        preds, labels = {}, {}
        for task in meter.task_name:
            classes = task not in ("l1", "two")
            preds[task] = torch.randn((size, 3) if classes else (size, 2), generator=generator)
            labels[task] = torch.randint(0, 3, (size,), generator=generator) if classes else preds[task].sigmoid() / 2
        labels["acc"][::3], labels["l1"][1::4, 0] = -100, torch.nan
        if size == 3:
            labels["f1"][:] = -100
        losses = {task: meter.losses[task].compute_loss(preds[task], labels[task]) for task in preds}
        yield losses, preds, labels


def _run(monkeypatch: pytest.MonkeyPatch, one_by_one: bool, meter: PerformanceMeter) -> PerformanceMeter:
    meter.begin()
    with monkeypatch.context() as patched:
        if one_by_one:
            patched.setattr(BatchQueue, "put", lambda *_: False)
        for batch in _batches(meter):
            meter.update(*batch)
    meter.end()
    return meter


def test_losses_and_scores_are_those_of_batches_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    queued, plain = _run(monkeypatch, False, _meter()), _run(monkeypatch, True, _meter())
    assert queued.loss_item.tolist() == plain.loss_item.tolist()
    for task, scores in plain.results.items():
        assert queued.results[task] == pytest.approx(scores, rel=1e-12)


def test_batches_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    update = AccMetric.update_fun

    def counted(self: AccMetric, pred: Tensor, gt: Tensor) -> None:
        calls.append(len(gt))
        update(self, pred, gt)

    monkeypatch.setattr(AccMetric, "update_fun", counted)
    _run(monkeypatch, False, _meter())
    assert sum(calls) == 2 * sum(SIZES)
    # Of two tasks: the first of eight rows, 64 of them, the rest; the first of five and the rest; one of three.
    assert len(calls) == 2 * 6


def test_what_does_not_fit_is_said_at_once() -> None:
    meter = _meter()
    meter.begin()
    losses, preds, labels = next(_batches(meter))
    with pytest.raises(UsageError, match="AccMetric"):
        meter.update(losses, preds, labels | {"acc": labels["acc"][:3]})


class Masked:
    """A mixin that says which labels are missing, and sees each batch."""

    def labelled(self, gt: Tensor) -> Tensor:
        return gt != 2

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        raise NotImplementedError


def test_what_a_mixin_overrides_counts() -> None:
    class Loss(Masked, CELoss): ...

    class Metric(Masked, AccMetric): ...

    assert CELoss.marks_entries
    assert AccMetric.adds_rows
    assert not Loss.marks_entries
    assert not Metric.adds_rows
    assert Metric.missing is None


def test_tensors_may_be_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    want, got = _run(monkeypatch, True, _meter()), _meter()
    got.begin()
    buffers: dict[Any, Tensor] = {}
    for losses, preds, labels in _batches(got):
        kept = []
        for name, tensors in (("pred", preds), ("label", labels)):
            for task, tensor in tensors.items():
                buffer = buffers.setdefault((name, task, tensor.shape), torch.empty_like(tensor))
                buffer.copy_(tensor)
            kept.append({task: buffers[name, task, tensor.shape] for task, tensor in tensors.items()})
        got.update(losses, *kept)
        for buffer in buffers.values():
            buffer.zero_()
    got.end()
    assert got.loss_item.tolist() == want.loss_item.tolist()
    assert {task: pytest.approx(scores) for task, scores in want.results.items()} == got.results


def test_sums_do_not_depend_on_when_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    want, got = _run(monkeypatch, False, _meter()), _meter()
    got.begin()
    for number, batch in enumerate(_batches(got)):
        got.update(*batch)
        if number % 7 == 0:
            sums = got.loss_sums()
            got.begin()
            got.go_on(sums)
    got.end()
    assert got.loss_item.tolist() == want.loss_item.tolist()


class OwnMetric(AbsMetric):
    def update_fun(self, pred: Any, gt: Any) -> None:
        self.record.append(float((pred.argmax(1) == gt).sum()))

    def score_fun(self) -> list[float]:
        return [sum(self.record) / len(self.record)]


class Louder(AccMetric):
    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        super().update_fun(pred, gt)
        self.bs.append(len(gt))


class OwnLoss(AbsLoss):
    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return (pred - gt).square().mean()

    def divisor(self, gt: Tensor) -> int:
        return len(gt)


@pytest.mark.parametrize("metric", [OwnMetric, Louder])
def test_a_metric_of_ones_own_sees_each_batch(monkeypatch: pytest.MonkeyPatch, metric: type[AbsMetric]) -> None:
    meter = _run(monkeypatch, False, _meter(metrics={"weighted": metric()}))
    own = meter.metrics["weighted"]
    assert len(own.record or own.bs) == len(SIZES)


def test_a_loss_with_a_divisor_of_its_own_is_weighted_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[str, AbsLoss] = {"two": OwnLoss()}
    queued, plain = (_run(monkeypatch, way, _meter(losses=losses)) for way in (False, True))
    assert queued.loss_item.tolist() == plain.loss_item.tolist()


@pytest.mark.parametrize("loss", [CELoss(), CELoss(weight=[1, 2, 0]), L1Loss(), MSELoss()])
def test_divisors_are_those_of_each_batch(loss: AbsLoss) -> None:
    generator = torch.Generator().manual_seed(1)
    classes = isinstance(loss, CELoss)
    batches = [
        torch.randint(0, 3, (4,), generator=generator) if classes else torch.randn(4, 2, generator=generator)
        for _ in range(3)
    ]
    batches[0][1] = -100 if classes else torch.nan
    torch.testing.assert_close(
        loss.divisors(torch.cat(batches), 3).double(), torch.stack([loss.divisor(gt) for gt in batches]).double()
    )
