"""What a training run tells the outside: the `Logger` base class and the records it is given.

The trainer keeps losses, weights and Gram matrices on the device and hands them over a log interval at a time, so a
logger never makes the device wait inside a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["Logger", "LoggerList", "RunInfo", "StepRecords", "as_logger", "conflict_share", "pair_names"]


@dataclass(kw_only=True, slots=True)
class RunInfo:
    """What is known before the first step, with the names of strategy, architecture and device.

    Attributes:
        task_names: The tasks, in the order of every array's task axis.
        metric_names: The metrics of each task, in the order `Logger.on_epoch` gives their values.
        epochs: Epochs the run will have when it is done.
        batches_per_epoch: Training steps in one epoch.
        start_epoch: First epoch of this process; not 0 when a run goes on.
        start_batch: First batch within that epoch.
        save_path: Where checkpoints go, or None.
        metric_weights: For each metric of each task 1 if higher is better, else 0.
        group_names: The groups of shared parameters that are weighed apart, in the order of every array's group axis;
            none without.
    """

    task_names: list[str]
    metric_names: dict[str, list[str]]
    epochs: int
    batches_per_epoch: int
    weighting: str
    architecture: str
    device: str
    start_epoch: int
    start_batch: int
    save_path: Path | None
    metric_weights: dict[str, list[int]] = field(default_factory=dict)
    group_names: list[str] = field(default_factory=list)

    @property
    def start_step(self) -> int:
        """Global index of the first step of this process."""
        return self.start_epoch * self.batches_per_epoch + self.start_batch


@dataclass(kw_only=True, slots=True)
class StepRecords:
    """The n training steps since the last log, as numpy arrays read from the device in one transfer.

    Attributes:
        epoch: Epoch these steps belong to.
        first_step: Global index of the first of them (row 0), counted from 0 over all epochs.
        losses: (n, T) task losses.
        weights: (n, T) task weights the strategy used, or None where it has none.
        gram: (n, T, T) inner products of the task gradients, or None where the strategy needs none.
        gram_errors: (n,) errors of Gram matrices that were estimated: the greatest of an entry, over the norms of the
            two gradients; NaN for steps in which it was not measured, None where it was in none.
        group_weights: (n, L, T) task weights of groups of shared parameters, or None without.
        group_grams: (n, L, T, T) inner products of the task gradients in each group, or None likewise.
        seconds: Wall time the n steps took.
        loss_scale: Factor on the losses of float16 steps after these n; None in other precisions.
        skipped: Steps of the run so far that changed nothing, as a float16 gradient overflowed; None likewise.
    """

    epoch: int
    first_step: int
    losses: np.ndarray
    weights: np.ndarray | None
    gram: np.ndarray | None
    seconds: float
    gram_errors: np.ndarray | None = None
    group_weights: np.ndarray | None = None
    group_grams: np.ndarray | None = None
    loss_scale: float | None = None
    skipped: int | None = None

    @property
    def count(self) -> int:
        """Number of steps n."""
        return len(self.losses)

    @property
    def steps_per_second(self) -> float:
        """Steps per second of wall time; NaN when no time was measured."""
        return self.count / self.seconds if self.seconds > 0 else math.nan

    @property
    def norms(self) -> np.ndarray | None:
        """(n, T) gradient norms, sqrt(G_tt)."""
        if self.gram is None:
            return None
        return np.sqrt(np.diagonal(self.gram, axis1=1, axis2=2))

    @property
    def cosines(self) -> np.ndarray | None:
        """(n, T(T-1)/2) cosines G_ij / sqrt(G_ii G_jj) of the pairs i < j; NaN where a gradient is zero."""
        norms = self.norms
        if self.gram is None or norms is None:
            return None
        i, j = np.triu_indices(self.gram.shape[-1], k=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            # Two divisions, as the product of two small norms may underflow.
            cosines = self.gram[:, i, j] / norms[:, i] / norms[:, j]
        return np.where(np.isfinite(cosines), np.clip(cosines, -1.0, 1.0), np.nan)

    @property
    def conflicts(self) -> np.ndarray | None:
        """(n,) shares of the pairs of tasks that conflict, see `conflict_share`."""
        if self.gram is None or self.gram.shape[-1] < 2:
            return None
        return conflict_share(torch.from_numpy(self.gram)).numpy()

    def conflicts_of_pairs(self, task_names: Sequence[str]) -> dict[str, float]:
        """Return for each pair of tasks, by the names of `pair_names`, the share of the n steps in which it conflicts.

        Steps without one of the two do not count. Empty without Gram matrices.
        """
        if self.gram is None:
            return {}
        i, j = np.triu_indices(self.gram.shape[-1], k=1)
        products = self.gram[:, i, j]
        shares = _column_means(np.where(np.isfinite(products), products < 0, np.nan))
        return dict(zip(pair_names(task_names), shares, strict=True))

    def by_group(self, group_names: Sequence[str]) -> dict[str, StepRecords]:
        """Return the records of each group of shared parameters, as if the network had no others; none without."""
        weights, grams = self.group_weights, self.group_grams
        if grams is None:
            return {}
        return {
            name: replace(
                self,
                weights=None if weights is None else weights[:, place],
                gram=grams[:, place],
                gram_errors=None,
                group_weights=None,
                group_grams=None,
            )
            for place, name in enumerate(group_names)
        }

    def means(self, task_names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Means over the n steps, NaN left out: ``{"loss": {task: mean}, "weight": ..., "norm": ..., "cosine": ...}``.

        Cosines are named by pair (`pair_names`), ``"conflict"`` has the ``"share"`` of pairs that conflict, ``"gram"``
        the ``"error"`` of estimates; what the strategy does not have is absent.
        """
        columns = {
            "loss": (list(task_names), self.losses),
            "weight": (list(task_names), self.weights),
            "norm": (list(task_names), self.norms),
            "cosine": (pair_names(task_names), self.cosines),
            "conflict": (["share"], None if self.conflicts is None else self.conflicts[:, None]),
            "gram": (["error"], None if self.gram_errors is None else self.gram_errors[:, None]),
        }
        return {
            key: dict(zip(names, _column_means(values), strict=True))
            for key, (names, values) in columns.items()
            if values is not None
        }


def conflict_share(gram: Tensor) -> Tensor:
    """Return the share of the pairs of tasks, of those in a step, whose gradients have a negative inner product.

    Of the (..., T, T) inner products those that are not finite, as of a task that was not in the step, do not count;
    the share is NaN where none is finite.
    """
    row, column = torch.triu_indices(gram.shape[-1], gram.shape[-1], 1, device=gram.device)
    pairs = gram[..., row, column]
    known = pairs.isfinite()
    return ((pairs < 0) & known).sum(-1).to(gram.dtype) / known.sum(-1)


def pair_names(task_names: Sequence[str]) -> list[str]:
    """Names ``"a:b"`` of the pairs i < j, in the order of `StepRecords.cosines`."""
    return [f"{a}:{b}" for i, a in enumerate(task_names) for b in task_names[i + 1 :]]


def _column_means(rows: np.ndarray) -> list[float]:
    known = ~np.isnan(rows)
    counts = known.sum(axis=0)
    sums = np.where(known, rows, 0.0).sum(axis=0)
    return [float(total / count) if count else math.nan for total, count in zip(sums, counts, strict=True)]


class Logger:
    """Base of all loggers. Every method does nothing; override those you need."""

    def on_start(self, info: RunInfo) -> None:
        """Training is about to begin or go on."""

    def on_steps(self, records: StepRecords) -> None:
        """A log interval is over, or the epoch is; `records` has at least one step."""

    def on_epoch(
        self, epoch: int, mode: str, losses: dict[str, float], metrics: dict[str, list[float]], seconds: float
    ) -> None:
        """One pass over a data split, ``"train"``, ``"val"`` or ``"test"``, is over; epochs count from 0.

        The tasks' mean losses over the pass; their metrics, in the order of `RunInfo.metric_names`; its wall time.
        """

    def on_compile(self, message: str) -> None:
        """Compilation begins or ends, in one line.

        ``"compiling trunk"`` begins; anything that does not start with ``compiling``, such as ``"compiled trunk in 12.3
        s"``, ends what was begun.
        """

    def on_checkpoint(self, path: Path, kind: str) -> None:
        """A checkpoint is whole on disk; `kind` is ``"best"`` or ``"last"``."""

    def on_stop(self, epoch: int, best_epochs: dict[str, int]) -> None:
        """The run is stopped early after an epoch; the best epoch of each task that has one. `on_end` follows."""

    def on_end(self, best_epoch: int, best_result: dict[str, list[float]]) -> None:
        """Training is over or was interrupted; the best epoch so far and its metrics."""


class LoggerList(Logger):
    """Passes every call to each of several loggers, in order."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)
        for event in vars(Logger):
            if event.startswith("on_"):
                setattr(self, event, partial(self._pass_on, event))

    def _pass_on(self, event: str, *args: object, **named: object) -> None:
        for logger in self.loggers:
            getattr(logger, event)(*args, **named)


def as_logger(logger: Logger | Sequence[Logger] | None) -> Logger:
    """Return one logger for what a user may pass as ``logger=``.

    Raises:
        UsageError: Something that is no `Logger` was passed.
    """
    if logger is None:
        return Logger()
    if isinstance(logger, Logger):
        return logger
    loggers = list(logger) if isinstance(logger, Sequence) else [logger]
    for member in loggers:
        if not isinstance(member, Logger):
            raise UsageError(f"logger must be a Logger, a list of them or None, got {type(member).__name__}.")
    return LoggerList(loggers)
