"""Scores of torchmetrics in several processes, one of which has no label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastmtl.distributed import find_peers
from fastmtl.loss import BCELoss
from fastmtl.metrics import TorchMetric
from fastmtl.model._torchvision import import_torchvision
from tests.distributed.group import in_processes
from tests.trainer.toy import make_trainer


def _scored(flipped: bool) -> list[float]:
    import_torchvision()
    from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

    about = {"metrics": ["auc", "acc"], "weight": [1, 1], "loss_fn": BCELoss()}
    about["metrics_fn"] = TorchMetric(BinaryAUROC(), BinaryAccuracy())
    torch.manual_seed(0)
    decoders = nn.ModuleDict({"task": nn.Linear(8, 1)})
    trainer = make_trainer("EW", count=1, task_dict={"task": about}, decoders=decoders)
    x, labels = torch.randn(16, 6), (torch.randn(16, 1) > 0).to(torch.get_default_dtype())
    labels[8:] = labels[::3] = torch.nan
    if flipped:
        x, labels = x.flip(0), labels.flip(0)
    peers = find_peers()
    rows = slice(None) if peers is None else slice(8 * peers.rank, 8 * peers.rank + 8)
    trainer.test([(x[rows], {"task": labels[rows]})])
    return [*trainer.meter.results["task"], float(trainer.meter.loss_item[0])]


def _both(given: Any) -> list[list[float]]:
    return [_scored(False), _scored(True)]


@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_all_labels(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        expected = _both(None)
    finally:
        torch.set_default_dtype(torch.float32)
    for of_rank in in_processes(2, tmp_path, _both, None):
        for found, wanted in zip(of_rank, expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-9)
