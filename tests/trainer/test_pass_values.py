"""Losses and scores of a pass by hand: of samples, of losses with sums of their own, and compared with the first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fastmtl.engine.labels import labelled_entries, present_tasks
from fastmtl.loss import AbsLoss, CELoss, MSELoss, SegLoss
from fastmtl.metrics import L1Metric
from fastmtl.support.running import RunningMean
from fastmtl.trainer.log.meter import PerformanceMeter
from tests.trainer.toy import loaders, make_trainer

NAN = math.nan


def _show(meter: PerformanceMeter, epoch: int, accuracy: float, error: float) -> None:
    """End an epoch with these scores."""
    meter.results = {"task0": [accuracy], "task1": [error]}
    meter.loss_item = np.array([1.0, error])
    meter.display("test", epoch)


@pytest.mark.parametrize("name", ["MoDo", "SDMGrad", "MOML", "AutoLambda"])
def test_the_loss_of_samples_counts_the_labels_of_all_of_them(name: str) -> None:
    x, labels = next(iter(loaders(2)))
    trainer = make_trainer(name, optim_param={"optim": "sgd", "lr": 0.0})
    expected = [loss.item() for loss in trainer.step.problem.whole(x, labels)[0]]
    samples = trainer.step.batches
    without = {"task0": labels["task0"]}
    trainer.train([(x, labels)] * (samples - 1) + [(x, without)], [(x, labels)], 1)
    if trainer.model.needs == "lookahead":
        # The step trains with its last batch alone.
        expected[1] = 1.0
    assert trainer.model.train_loss_buffer[:, 0] == pytest.approx(expected)
    # One step in which a row counts twice as often as another.
    few = (x[:2], {task: values[:2] for task, values in labels.items()})
    meter = trainer.meter
    meter.begin()
    meter.update({"task0": torch.tensor(1.0)}, {"task0": torch.zeros(2, 3)}, few[1], None, [labels])
    rows = len(x) + 2
    meter.update({"task0": torch.tensor(4.0)}, {"task0": torch.zeros(2, 3)}, few[1], None, [])
    meter.end()
    assert meter.loss_item[0] == pytest.approx((rows * 1.0 + 2 * 4.0) / (rows + 2))


def test_an_epoch_without_a_number_leaves_the_comparison_to_the_next() -> None:
    meter = make_trainer("EW").meter
    for epoch, (accuracy, error) in enumerate([(NAN, 2.0), (0.5, 1.0), (0.6, 1.0)]):
        _show(meter, epoch, accuracy, error)
        assert not math.isnan(meter.improvement)
    # A fifth more than that of epoch 1, half of that of epoch 0.
    assert meter.improvement == pytest.approx((0.2 + 0.5) / 2)
    assert meter.best_result["epoch"] == 2
    assert meter.base_result == {"task0": [0.5], "task1": [2.0]}
    meter = make_trainer("EW").meter
    for epoch, (accuracy, error) in enumerate([(NAN, NAN), (0.5, 1.0), (0.6, 0.5), (0.5, 0.5)]):
        _show(meter, epoch, accuracy, error)
    assert meter.best_result["epoch"] == 2
    assert meter.best_result["improvement"] == pytest.approx((0.2 + 0.5) / 2)


def test_a_base_result_that_was_given_stays() -> None:
    meter = make_trainer("EW").meter
    base = {"task0": [NAN], "task1": [2.0]}
    other = PerformanceMeter(meter.task_dict, base)
    _show(other, 0, 0.5, 1.0)
    _show(other, 1, 0.9, 1.0)
    assert other.base_result is base
    assert other.improvement == pytest.approx(0.5)


class _OwnSums(AbsLoss):
    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return (pred - gt).square().mean()


class _OwnMean(_OwnSums):
    def _average_loss(self) -> float:
        return float((np.array(self.record) * np.array(self.bs)).sum() / sum(self.bs))


class _OwnUpdate(_OwnSums):
    def _update_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        loss = self.compute_loss(pred, gt)
        self.record.append(loss.item())
        self.bs.append(len(pred))
        return loss


class _OwnBoth(_OwnUpdate, _OwnMean):
    pass


class _OwnBeginning(_OwnSums):
    def _reinit(self) -> None:
        self.begun = True


@pytest.mark.parametrize("make", [_OwnSums, _OwnMean, _OwnUpdate, _OwnBoth, _OwnBeginning])
def test_losses_with_sums_as_libmtl_has_them(make: Any) -> None:
    meter = PerformanceMeter({"task": {"metrics": ["L1"], "metrics_fn": L1Metric(), "loss_fn": make(), "weight": [0]}})
    # Squares 1, 1 and 4, then 9.
    for batches, expected in (([[1.0, 1.0], [2.0]], 2.0), ([[3.0]], 9.0)):
        meter.begin()
        for values in batches:
            pred = torch.tensor(values)
            meter.update({"task": pred.square().mean()}, {"task": pred}, {"task": torch.zeros(len(pred))})
        meter.end()
        assert meter.loss_item.tolist() == [expected]


def test_sums_in_half_precision_have_room() -> None:
    pred = torch.full((100_000, 1), 3.0, dtype=torch.float16)
    gt = torch.zeros(100_000, 1, dtype=torch.float16)
    assert MSELoss().compute_loss(pred, gt).item() == 9
    logits = torch.zeros(100_000, 4, dtype=torch.float16)
    assert CELoss().compute_loss(logits, torch.zeros(100_000).long()).item() == pytest.approx(math.log(4), rel=1e-3)
    maps = logits.T.reshape(1, 4, 250, 400)
    assert SegLoss().compute_loss(maps, torch.zeros(1, 250, 400)).item() == pytest.approx(math.log(4), rel=1e-3)


def test_a_mean_over_more_than_float32_counts() -> None:
    mean = RunningMean()
    mean.add(torch.tensor(1.0), torch.tensor(2**24))
    state = mean.state()
    mean.add(torch.tensor(0.0), torch.tensor(1))
    assert mean.value() == 2**24 / (2**24 + 1)
    mean.restore(state)
    assert mean.value() == 1.0


class _TensorsOnly(AbsLoss):
    def labelled(self, gt: Any) -> Any:
        return ~gt.isnan()

    def divisor(self, gt: Any) -> Any:
        return self.labelled(gt).sum()


class _InNumpy(AbsLoss):
    def labelled(self, gt: Any) -> Any:
        return np.array([len(boxes) > 0 for boxes in gt])


class _InNumpyWeighed(_InNumpy):
    def divisor(self, gt: Any) -> Any:
        return self.labelled(gt).sum() * np.float64(0.25)


class _Joined(AbsLoss):
    def labelled(self, gt: Any) -> Any:
        return torch.stack(gt).isfinite()


def test_methods_for_tensors_and_in_numpy_are_asked_of_lists() -> None:
    boxes = [torch.ones(2, 4), torch.zeros(0, 4), torch.ones(1, 4)]
    assert float(labelled_entries(_InNumpy(), boxes)) == 2
    assert float(labelled_entries(_InNumpyWeighed(), boxes)) == 0.5
    assert present_tasks({"task": _InNumpyWeighed()}, [{"task": boxes[1:2]}]) == []
    masks = [torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0])]
    assert float(labelled_entries(_TensorsOnly(), masks)) == 3
    assert float(labelled_entries(_TensorsOnly(), {"a": masks[0]})) == 1
    assert float(labelled_entries(_Joined(), masks)) == 3


def test_an_epoch_without_an_improvement_does_not_lower_the_rate() -> None:
    trainer = make_trainer("EW", scheduler_param={"scheduler": "reduce", "mode": "max", "factor": 0.5, "patience": 0})
    schedule = trainer.schedule
    assert isinstance(schedule.scheduler, ReduceLROnPlateau)
    (group, *_) = trainer.optimizer.param_groups
    first = group["lr"]
    for improvement, factor in ((0.0, 1.0), (NAN, 1.0), (0.1, 1.0), (0.1, 0.5), (NAN, 0.5)):
        schedule.after_epoch(improvement)
        assert group["lr"] == first * factor
