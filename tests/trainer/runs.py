"""Runs made up for the tests of the loggers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastmtl.trainer.log.logger import Logger, RunInfo, StepRecords

STEPS_PER_EPOCH = 10


def run_info(tasks: Sequence[str] = ("left", "right"), *, epochs: int = 2, start_epoch: int = 0) -> RunInfo:
    return RunInfo(
        task_names=list(tasks),
        metric_names={task: ["Acc"] for task in tasks},
        epochs=epochs,
        batches_per_epoch=STEPS_PER_EPOCH,
        weighting="MGDA",
        architecture="HPS",
        device="cpu",
        start_epoch=start_epoch,
        start_batch=0,
        save_path=Path("runs/x"),
    )


def step_records(step: int, count: int, tasks: int = 2, *, gram: bool = True, weights: bool = True) -> StepRecords:
    """Steps with loss step + t for task t, equal weights, and gradients that all have norm 2 and cosine 0.5."""
    at = np.arange(step, step + count, dtype=float)[:, None]
    one = 2.0 * np.eye(tasks) + 2.0
    return StepRecords(
        epoch=step // STEPS_PER_EPOCH,
        first_step=step,
        losses=at + np.arange(tasks),
        weights=np.full((count, tasks), 1 / tasks) if weights else None,
        gram=np.repeat(one[None], count, axis=0) if gram else None,
        seconds=count / 4,
    )


def play(logger: Logger, info: RunInfo, *, gram: bool = True, weights: bool = True) -> None:
    """Feed a logger the epochs that `info` has left, five steps at a time."""
    tasks = len(info.task_names)
    logger.on_start(info)
    for epoch in range(info.start_epoch, info.epochs):
        for step in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH, 5):
            logger.on_steps(step_records(step, 5, tasks, gram=gram, weights=weights))
        for mode in ("train", "test"):
            losses = dict.fromkeys(info.task_names, 1.0)
            metrics = {task: [0.5 + 0.1 * epoch] for task in info.task_names}
            logger.on_epoch(epoch, mode, losses, metrics, 2.5)
    logger.on_end(1, {task: [0.6] for task in info.task_names})
