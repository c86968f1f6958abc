"""Losses and metrics of a pass over the data, and LibMTL's log lines."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl._loss.base import LossState, added, updates_itself
from fastmtl._metrics.missing import marked
from fastmtl.distributed import Alone, Peers
from fastmtl.engine.labels import labelled_entries, labelled_places
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss
from fastmtl.metrics import AbsMetric
from fastmtl.support.kinds import Settings, State
from fastmtl.trainer.log.batches import BatchQueue
from fastmtl.trainer.setup.tasks import TaskDict, losses_of, metrics_of
from fastmtl.utils import count_improvement

__all__ = ["PerformanceMeter"]


class PerformanceMeter:
    """Accumulates losses and metrics on the device, reads them once per pass and prints them as LibMTL does.

    The improvement of ``best_result``, which has ``improvement``, ``epoch`` and ``result`` of the best epoch so far, is
    that over the scores ``base_result``; if None those of the first epoch, a NaN among them giving way to the first
    number. ``improvements`` are those of each task that had labels in the pass that last chose between epochs.
    ``peers`` each see a part of the data.
    """

    def __init__(
        self, task_dict: TaskDict, base_result: dict[str, list[float]] | None = None, peers: Peers | None = None
    ) -> None:
        self.task_dict = task_dict
        self.peers = peers or Alone()
        self.task_name = list(task_dict)
        self.weight: dict[str, list[int]] = {task: task_dict[task]["weight"] for task in self.task_name}
        self.losses: dict[str, AbsLoss] = losses_of(task_dict)
        self.metrics: dict[str, AbsMetric] = metrics_of(task_dict)
        self.base_result = base_result
        self._completes_base = base_result is None
        self.best_result: State = {"improvement": -1e2, "epoch": 0, "result": 0}
        self.improvement: float | None = None
        self.improvements: dict[str, float] = {}
        self.has_val = False
        self.results: dict[str, list[float]] = {}
        self.loss_item: np.ndarray = np.zeros(len(self.task_name))
        self.unlabelled: set[str] = set()
        self.seconds = 0.0
        self._begin = 0.0
        self._has_batches = False
        self._seen: set[str] = set()
        self._scored: set[str] = set()
        self._queue = BatchQueue(self.losses, self.metrics)

    def begin(self) -> None:
        """Start a pass: the clock and empty sums."""
        for task in self.task_name:
            self.losses[task]._reinit()
            # Which one of a user's own need not know of.
            self.losses[task]._running.reset()
            self.metrics[task].reinit()
        # Losses and metrics may be others than in the last pass.
        self._queue = BatchQueue(self.losses, self.metrics)
        self._has_batches = False
        self._seen.clear()
        self._scored.clear()
        self._begin = time.perf_counter()

    @torch.no_grad()
    def update(
        self,
        losses: Mapping[str, Tensor],
        preds: Settings,
        labels: Settings,
        on_host: Settings | None = None,
        others: Sequence[Settings] = (),
    ) -> None:
        """Take in one batch.

        Args:
            losses: Its losses by task.
            preds: Its predictions by task.
            labels: Its labels by task.
            on_host: The labels as they were before they came to the device, where looking for missing ones would wait.
            others: Labels by task of further batches that the losses are means over, without predictions.
        """
        self._has_batches = True
        # One task at a time of several would not be of one layout.
        together = not others and len(losses) == len(self.task_name)
        if together and self._queue.put(losses, preds, labels):
            if self._queue.is_full:
                self._add_up()
            return
        if len(self._queue):
            self._add_up()
            if together and self._queue.put(losses, preds, labels):
                return
        for task, loss in losses.items():
            scored = labels.get(task) is not None
            if not scored and all(batch.get(task) is None for batch in others):
                continue
            self._seen.add(task)
            if scored and updates_itself(self.losses[task]):
                self.losses[task]._update_loss(preds[task], labels[task])
            else:
                counts = [labelled_entries(self.losses[task], batch.get(task)) for batch in (labels, *others)]
                self.losses[task].accumulate(loss, sum(counts))
            if scored:
                self._score(task, preds[task], labels[task], (on_host or labels)[task])

    @torch.no_grad()
    def _add_up(self) -> None:
        """Take in the batches that are queued."""
        count = len(self._queue)
        for task, losses, pred, gt in self._queue.take():
            loss = self.losses[task]
            loss._running.add_each(losses, loss.divisors(gt, count))
            self._score(task, pred, gt, gt)
            self._seen.add(task)

    def _score(self, task: str, pred: Any, gt: Any, on_host: Any) -> None:
        """Show a metric what is labelled of a batch."""
        loss, metric = self.losses[task], self.metrics[task]
        marker = getattr(metric, "missing", None)
        if not isinstance(gt, Tensor) or gt.dim() == 0:
            if not bool(labelled_entries(loss, on_host) > 0):
                return
            metric.update_fun(pred, gt)
        elif marker is not None:
            metric.update_fun(pred, marked(gt, labelled_places(loss, gt), marker))
        else:
            known = labelled_places(loss, on_host)
            if not known.any():
                return
            if known.all():
                metric.update_fun(pred, gt)
            else:
                # Metrics written for LibMTL derive from a class of its own.
                getattr(metric, "update_known", partial(AbsMetric.update_known, metric))(pred, gt, known.cpu())
        self._scored.add(task)

    def loss_sums(self) -> dict[str, LossState]:
        """Return the losses of the pass so far by task, for :meth:`go_on`."""
        self._add_up()
        return {task: self.losses[task]._state() for task in self._seen}

    def go_on(self, *loss_sums: Mapping[str, LossState]) -> None:
        """Take up a pass that was interrupted: its losses, which strategies may read; its metrics begin anew.

        Args:
            loss_sums: The losses of parts of the batches.
        """
        for task in self.task_name:
            states = [sums[task] for sums in loss_sums if task in sums]
            if states:
                self.losses[task]._restore(added(states))
                self._seen.add(task)

    @torch.no_grad()
    def end(self) -> None:
        """End a pass: read ``results`` and ``loss_item``, with several processes those of all of them.

        They are NaN for a task that no batch had labels of, which is in ``unlabelled``.
        """
        self._add_up()
        for seen, scored, has_batches in self.peers.all_gather_object((self._seen, self._scored, self._has_batches)):
            self._seen |= seen
            self._scored |= scored
            self._has_batches |= has_batches
        for task in self.task_name:
            self.peers.sync([self.losses[task], self.metrics[task]])
        # A pass without any batch is an error, which the losses and metrics report.
        names = set(self.task_name)
        scored, seen = (self._scored, self._seen) if self._has_batches else (names, names)
        self.results = {
            task: self._scores(task) if task in scored else [math.nan] * len(self.weight[task])
            for task in self.task_name
        }
        self.loss_item = np.array(
            [self.losses[task]._average_loss() if task in seen else math.nan for task in self.task_name]
        )
        self.unlabelled = {task for task in self.task_name if task not in seen or self.losses[task].is_unlabelled()}
        self.seconds = time.perf_counter() - self._begin

    def _scores(self, task: str) -> list[float]:
        returned, wanted = self.metrics[task].score_fun(), len(self.weight[task])
        try:
            scores = [float(score) for score in returned]
        except TypeError:
            scores = []
        if len(scores) != wanted:
            raise UsageError(
                f"score_fun of {type(self.metrics[task]).__name__} must return a list of one score per metric of "
                f"{task!r}, {wanted} in all, got {returned!r}."
            )
        return scores

    def display_format(self) -> None:
        """Print what the columns of the epoch lines are."""
        columns = " | ".join(" ".join([f"{task}_LOSS", *self.task_dict[task]["metrics"]]) for task in self.task_name)
        print("=" * 40)
        print(f"LOG FORMAT | {columns} | TIME")

    def display(self, mode: str, epoch: int | None) -> None:
        """Print the part of the epoch line that belongs to ``mode`` and keep the best result."""
        if epoch is not None:
            if epoch == 0 and self.base_result is None and mode == ("val" if self.has_val else "test"):
                self.base_result = self.results
            if mode == "train":
                print(f"Epoch: {epoch:04d} | ", end="")
            elif mode == ("val" if self.has_val else "test"):
                self._update_best(epoch)
            elif epoch == self.best_result["epoch"]:
                self.best_result["result"] = self.results
        parts = [
            " ".join(self._shown(task, value) for value in [loss, *self.results[task]])
            for loss, task in zip(self.loss_item, self.task_name, strict=True)
        ]
        name = {"train": "TRAIN", "val": "VAL"}.get(mode, "TEST")
        end = "\n" if mode == "test" else " | "
        print(f"{name}: {' | '.join(parts)} | Time: {self.seconds:.4f}", end=end, flush=True)

    def _shown(self, task: str, value: float) -> str:
        return "-" if math.isnan(value) and task in self.unlabelled else f"{value:.4f}"

    def display_best_result(self) -> None:
        """Print the best epoch and its scores."""
        print("=" * 40)
        print(f"Best Result: Epoch {self.best_result['epoch']}, result {self.best_result['result']}")
        print("=" * 40)

    def _update_best(self, epoch: int) -> None:
        assert self.base_result is not None
        if self._completes_base:
            self.base_result = _completed(self.base_result, self.results)
        # What has no labels cannot be compared, and says nothing of the other tasks.
        base = {task: scores for task, scores in self.base_result.items() if task not in self.unlabelled}
        self.improvement = count_improvement(base, self.results, self.weight) if base else math.nan
        self.improvements = {
            task: count_improvement({task: scores}, self.results, self.weight) for task, scores in base.items()
        }
        best = self.best_result["result"] or {}
        # Left out, a task would make an epoch better that is only less complete.
        complete = not any(_is_known(best.get(task, [])) for task in self.unlabelled)
        if complete and self.improvement > self.best_result["improvement"]:
            self.best_result = {"improvement": self.improvement, "epoch": epoch, "result": self.results}


def _completed(base: Mapping[str, Sequence[float]], results: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return scores to compare with, those that are NaN from the first epoch that has them."""
    return {
        task: [now if math.isnan(score) else score for score, now in zip(base[task], results[task], strict=True)]
        for task in base
    }


def _is_known(scores: Sequence[float]) -> bool:
    return any(not math.isnan(score) for score in scores)
