"""Run folders made up for the tests, and a small problem to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from fastmtl.experiments import Problem
from fastmtl.loss import CELoss, MSELoss
from fastmtl.metrics import AccMetric, L1Metric
from fastmtl.model import MLPEncoder
from fastmtl.trainer.log.jsonl import JsonlLogger
from fastmtl.trainer.log.logger import RunInfo, StepRecords

__all__ = ["METRICS", "make_data", "write_run"]

METRICS = {"kind": ["Acc"], "size": ["L1", "L2"]}
_BETTER = {"kind": [1], "size": [0, 0]}
_STEPS = 4


def write_run(
    folder: Path,
    *,
    arch: str = "HPS",
    weighting: str = "EW",
    seed: int = 0,
    scores: Sequence[Sequence[float]] = ((0.5, 1.0, 2.0),),
    val: bool = False,
    gram: np.ndarray | None = None,
    done: bool = True,
    dataset: str = "made",
    metrics: Mapping[str, list[str]] = METRICS,
    better: Mapping[str, list[int]] = _BETTER,
    **config: Any,
) -> Path:
    """Write a run folder; ``scores`` are the test metrics of its epochs, all tasks' one after the other."""
    folder.mkdir(parents=True)
    about = {"dataset": dataset, "arch": arch, "weighting": weighting, "seed": seed, "lr": 0.001, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    logger = JsonlLogger(folder / "metrics.jsonl")
    logger.on_start(
        RunInfo(
            task_names=list(metrics),
            metric_names=dict(metrics),
            epochs=len(scores) + (not done),
            batches_per_epoch=_STEPS,
            weighting=weighting,
            architecture=arch,
            device="cpu",
            start_epoch=0,
            start_batch=0,
            save_path=folder,
            metric_weights=dict(better),
        )
    )
    losses = dict.fromkeys(metrics, 1.0)
    for epoch, row in enumerate(scores):
        values = iter(row)
        by_task = {task: [next(values) for _ in names] for task, names in metrics.items()}
        for step in range(0, _STEPS, 2):
            logger.on_steps(
                StepRecords(
                    epoch=epoch,
                    first_step=epoch * _STEPS + step,
                    losses=np.ones((2, len(metrics))),
                    weights=None if gram is None else np.random.default_rng(step).uniform(size=(2, len(metrics))),
                    gram=None if gram is None else np.stack([gram, gram]),
                    seconds=0.5,
                )
            )
        for mode in ("train", *(["val"] if val else []), "test"):
            logger.on_epoch(epoch, mode, losses, by_task, 2.0)
    logger.on_end(0, {})
    if not done:
        # As it is while the run has more epochs to do.
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    return folder


class _Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(count, 6, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> Any:
        x = self.inputs[row]
        return x, {"kind": (x[:3] ** 2).argmax(), "size": x[3:].sum(0, keepdim=True)}


def make_data(seed: int) -> Problem:
    """Return a problem of a classification and a regression on vectors."""
    train = DataLoader(
        _Rows(32, 1), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(seed), drop_last=True
    )
    tasks: dict[str, dict[str, Any]] = {
        "kind": {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]},
        "size": {"metrics": ["L1"], "metrics_fn": L1Metric(), "loss_fn": MSELoss(), "weight": [0]},
    }
    return Problem(
        task_dict=tasks,
        train=train,
        val=DataLoader(_Rows(16, 2), batch_size=16),
        test=DataLoader(_Rows(16, 3), batch_size=16),
        encoder_class=lambda: MLPEncoder(6, [8]),
        decoders=lambda: nn.ModuleDict({"kind": nn.Linear(8, 3), "size": nn.Linear(8, 1)}),
        name="vectors",
    )
