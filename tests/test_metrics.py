"""Metrics: what numpy computes, accumulated without waiting for the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.metrics import AbsMetric, AccMetric, L1Metric
from tests.host_reads import NoHostRead


def _logits(seed: int, sizes: tuple[int, ...] = (9, 5, 1)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=generator), torch.randint(0, 4, (n,), generator=generator)) for n in sizes]


def test_accuracy_is_the_share_of_right_predictions() -> None:
    metric = AccMetric()
    for seed in (0, 1):
        batches = _logits(seed)
        with NoHostRead():
            for pred, gt in batches:
                metric.update_fun(pred, gt)
        right = np.concatenate([pred.numpy().argmax(1) == gt.numpy() for pred, gt in batches])
        assert metric.score_fun() == [right.mean()]
        metric.reinit()


def test_accuracy_of_labels_with_more_dimensions() -> None:
    metric = AccMetric()
    pred = torch.eye(3).expand(2, 3, 3)
    gt = torch.tensor([[0, 1, 2], [0, 0, 0]])
    metric.update_fun(pred, gt)
    assert metric.score_fun() == [4 / 6]


def test_mean_absolute_error_is_weighted_by_batch_size() -> None:
    metric = L1Metric()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 2, generator=generator), torch.randn(n, 2, generator=generator)) for n in (8, 3)]
    with NoHostRead():
        for pred, gt in batches:
            metric.update_fun(pred, gt)
    error = np.concatenate([np.abs(pred.numpy() - gt.numpy()) for pred, gt in batches])
    assert metric.score_fun() == pytest.approx([error.mean()], rel=1e-6)


@pytest.mark.parametrize("metric", [AccMetric(), L1Metric()], ids=["acc", "l1"])
def test_no_batch_is_an_error(metric: AbsMetric) -> None:
    with pytest.raises(UsageError, match="empty"):
        metric.score_fun()
    metric.update_fun(torch.ones(2, 2), torch.ones(2, 2) if isinstance(metric, L1Metric) else torch.tensor([0, 1]))
    metric.reinit()
    with pytest.raises(UsageError, match="empty"):
        metric.score_fun()


def test_a_metric_written_for_libmtl_works() -> None:
    class Counting(AbsMetric):
        def update_fun(self, pred: Tensor, gt: Tensor) -> None:
            self.record.append(gt.eq(pred.argmax(-1)).sum().item())
            self.bs.append(pred.size()[0])

        def score_fun(self) -> list[float]:
            return [sum(self.record) / sum(self.bs)]

    counting, ours = Counting(), AccMetric()
    for pred, gt in _logits(2):
        counting.update_fun(pred, gt)
        ours.update_fun(pred, gt)
    assert counting.score_fun() == ours.score_fun()
    counting.reinit()
    assert counting.record == []
    assert counting.bs == []


def test_a_metric_must_define_both_functions() -> None:
    with pytest.raises(NotImplementedError, match="update_fun"):
        AbsMetric().update_fun(None, None)
    with pytest.raises(NotImplementedError, match="score_fun"):
        AbsMetric().score_fun()


@pytest.mark.parametrize("shape", [(6, 5, 5), (6, 5, 4), (2, 4, 4, 4)], ids=str)
def test_accuracy_reads_logits_as_the_losses_do(shape: tuple[int, ...]) -> None:
    pred = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    metric = AccMetric()
    metric.update_fun(pred, pred.argmax(1))
    metric.update_fun(pred, (pred.argmax(1) + 1) % shape[1])
    assert metric.score_fun() == [0.5]


def test_accuracy_of_small_integers() -> None:
    metric = AccMetric()
    metric.update_fun(torch.eye(200)[[156, 3]], torch.tensor([156, 4], dtype=torch.uint8))
    assert metric.score_fun() == [0.5]
