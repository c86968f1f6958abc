"""What happened in a run so far, in memory that does not grow with its length."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastmtl.trainer.log.jsonl import read_jsonl
from fastmtl.trainer.log.logger import RunInfo, pair_names

__all__ = ["Curve", "History", "mean_cosines"]


class Curve:
    """Rows of values over the steps in bounded memory: every `stride` steps are averaged into one row.

    The stride doubles when there are more rows than `capacity`.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self.capacity = capacity
        self.stride = 1
        self.steps: np.ndarray = np.zeros(0)
        self.values: np.ndarray = np.zeros((0, 0))
        self._rest: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Append n rows: `steps` (n,), `values` (n, C)."""
        if self._rest is not None:
            steps, values = np.concatenate([self._rest[0], steps]), np.concatenate([self._rest[1], values])
        whole = len(steps) // self.stride * self.stride
        self._rest = steps[whole:], values[whole:]
        self.steps = np.concatenate([self.steps, _averaged(steps[:whole], self.stride)])
        rows = _averaged(values[:whole], self.stride)
        self.values = np.concatenate([self.values, rows]) if self.values.size else rows
        while len(self.steps) > self.capacity:
            self._double_stride()

    def smooth(self, window: int) -> np.ndarray:
        """Return the values averaged over `window` neighbouring rows, fewer at the ends; NaN is left out."""
        known = ~np.isnan(self.values)
        sums = _window_sums(np.where(known, self.values, 0.0), window)
        counts = _window_sums(known.astype(float), window)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    def _double_stride(self) -> None:
        if len(self.steps) % 2:
            # The row without a partner waits for the steps to come, as `stride` equal steps.
            last = np.repeat(self.steps[-1:], self.stride), np.repeat(self.values[-1:], self.stride, axis=0)
            rest = self._rest or (self.steps[:0], self.values[:0])
            self._rest = np.concatenate([last[0], rest[0]]), np.concatenate([last[1], rest[1]])
            self.steps, self.values = self.steps[:-1], self.values[:-1]
        self.steps, self.values = _averaged(self.steps, 2), _averaged(self.values, 2)
        self.stride *= 2


def _averaged(rows: np.ndarray, count: int) -> np.ndarray:
    """Return the means of every `count` rows; NaN, as of a task that was not in a step, is left out."""
    parts = rows.reshape(len(rows) // count, count, *rows.shape[1:])
    known = ~np.isnan(parts)
    sums, counts = np.where(known, parts, 0.0).sum(axis=1), known.sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def mean_cosines(cosines: np.ndarray) -> np.ndarray:
    """Return the means (n, L) of (n, L, pairs) cosines, NaN left out."""
    known = ~np.isnan(cosines)
    counts = known.sum(axis=2)
    return np.where(counts > 0, np.where(known, cosines, 0.0).sum(axis=2) / np.maximum(counts, 1), np.nan)


def _window_sums(rows: np.ndarray, window: int) -> np.ndarray:
    before = (window - 1) // 2
    sums = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0, dtype=float)])
    at = np.arange(len(rows))
    return sums[np.minimum(at + window - before, len(rows))] - sums[np.maximum(at - before, 0)]


@dataclass(kw_only=True, slots=True)
class History:
    """The curves of one run, (n, T) or (n, T(T-1)/2) and empty where the strategy has none, and its epochs' results.

    ``groups`` are the mean cosines (n, L) of the pairs of tasks in each group of shared parameters. ``results`` are the
    task metrics of an epoch by (mode, epoch).
    """

    info: RunInfo
    losses: Curve = field(default_factory=Curve)
    weights: Curve = field(default_factory=Curve)
    cosines: Curve = field(default_factory=Curve)
    groups: Curve = field(default_factory=Curve)
    results: dict[tuple[str, int], dict[str, list[float]]] = field(default_factory=dict)

    def read_earlier(self, path: Path) -> None:
        """Take the steps and epochs before the one a run goes on from, out of a ``metrics.jsonl``."""
        info = self.info
        columns = [
            ("loss", info.task_names, self.losses),
            ("weight", info.task_names, self.weights),
            ("cosine", pair_names(info.task_names), self.cosines),
        ]
        for row in read_jsonl(path):
            if row["event"] == "steps" and row["step"] <= info.start_step:
                middle = np.array([row["step"] - (row["count"] - 1) / 2])
                for key, names, curve in columns:
                    if row.get(key):
                        curve.add(middle, np.array([[row[key][name] for name in names]], dtype=float))
                if row.get("groups"):
                    cosines = [list(row["groups"][name].get("cosine", {}).values()) for name in info.group_names]
                    self.groups.add(middle, mean_cosines(np.array([cosines], dtype=float)))
            elif row["event"] == "epoch" and row["epoch"] < info.start_epoch:
                # JSON has null for a score that there is not.
                self.results[row["mode"], row["epoch"]] = {
                    task: [math.nan if score is None else score for score in named.values()]
                    for task, named in row["metric"].items()
                }
