"""Metrics of tasks, accumulated on the device.

Example::

    class Recall(AbsMetric):
        def update_fun(self, pred, gt):
            self.record.append(((pred > 0) & gt).sum())
            self.bs.append(gt.sum())

        def score_fun(self):
            return [(sum(self.record) / sum(self.bs)).item()]
"""

from __future__ import annotations

from typing import NoReturn

from fastmtl._metrics.base import AbsMetric
from fastmtl._metrics.classes import AccMetric, F1Metric, SegMetric
from fastmtl._metrics.distances import DepthMetric, L1Metric, NormalMetric
from fastmtl._metrics.ranking import AUCMetric, GAUCMetric, LogLossMetric
from fastmtl._metrics.torch_metric import TorchMetric
from fastmtl.errors import UsageError

__all__ = [
    "AUCMetric",
    "AbsMetric",
    "AccMetric",
    "DepthMetric",
    "F1Metric",
    "GAUCMetric",
    "L1Metric",
    "LogLossMetric",
    "NormalMetric",
    "SegMetric",
    "TorchMetric",
]

_FORMERLY = {
    "acc_update_fun": "AccMetric",
    "acc_score_fun": "AccMetric",
    "L1_update_fun": "L1Metric",
    "L1_score_fun": "L1Metric",
}


def __getattr__(name: str) -> NoReturn:
    if name in _FORMERLY:
        raise UsageError(
            f"{name} is a method of the class {_FORMERLY[name]}: write {{'metrics_fn': {_FORMERLY[name]}()}} in "
            f"place of the list of two functions."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
