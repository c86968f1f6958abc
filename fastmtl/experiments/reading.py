"""Run folders, read back: what was asked for, every epoch's metrics, every log interval's signals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastmtl.errors import UsageError
from fastmtl.support.extras import need
from fastmtl.support.named import short_name
from fastmtl.trainer.log.jsonl import read_jsonl
from fastmtl.trainer.run.directory import RunDirectory

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Run", "check_alike", "find_runs", "is_finished", "pandas", "read_run"]

# Settings that do not decide what a method is.
_NOT_OF_METHOD = frozenset(
    (
        *("seed", "device", "threads", "workers", "tensorboard", "plot", "profile", "log_every", "checkpoint_every"),
        *("resume_schedule", "peer_timeout"),
    )
)


def pandas() -> Any:
    """Return the module pandas.

    Raises:
        UsageError: It is not installed.
    """
    return need("pandas", "experiments", "A comparison of runs")


@dataclass(kw_only=True)
class Run:
    """One run folder.

    Attributes:
        path: The folder.
        config: Its ``config.yaml``.
        tasks: The tasks in order.
        metrics: Pairs (task, metric) in order.
        better: For each of them 1 if higher is better, else 0.
        epochs: Epochs that the run has when it is done.
        finished: Whether it is done.
        scores: Split (``train``, ``val``, ``test``) to a frame with a row per epoch and a column per (task, metric).
        losses: Split to a frame with a row per epoch and a column per task.
        steps: The lines of the log intervals.
        best_epoch: The best epoch by the validation split; None without one or before the end.
        seconds: Wall time of each training pass.
        peak_memory: Most bytes that a process of the run had; None if unknown.
        made_with: Versions, commit and machine.
    """

    path: Path
    config: dict[str, Any]
    tasks: list[str]
    metrics: list[tuple[str, str]]
    better: list[int]
    epochs: int
    finished: bool
    scores: dict[str, DataFrame]
    losses: dict[str, DataFrame]
    steps: list[dict[str, Any]] = field(repr=False)
    best_epoch: int | None
    seconds: list[float]
    peak_memory: int | None
    made_with: dict[str, Any]

    @property
    def arch(self) -> str:
        """The architecture."""
        return short_name(str(self.config["arch"]))

    @property
    def weighting(self) -> str:
        """The strategy."""
        return short_name(str(self.config["weighting"]))

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.config.get("seed", 0))

    @property
    def dataset(self) -> str:
        """The data set."""
        return str(self.config.get("dataset", "?"))

    @property
    def is_baseline(self) -> bool:
        """Whether it is of single-task learning."""
        return self.arch == "STL"

    def settings(self) -> dict[str, Any]:
        """Return what decides the results besides the seed, by name; hyper-parameters by their own names."""
        flat = {name: value for name, value in self.config.items() if name not in _NOT_OF_METHOD}
        return {**flat, **flat.pop("arch_args", {}), **flat.pop("weight_args", {})}

    def signal(self, kind: str) -> DataFrame:
        """Return a signal of the log intervals, such as ``"loss"``, ``"weight"``, ``"norm"``, ``"cosine"``.

        A row per interval, by the number of steps done; a column per task or pair of tasks. Empty if there is none.
        """
        rows = {row["step"]: row[kind] for row in self.steps if row.get(kind)}
        return pandas().DataFrame.from_dict(rows, orient="index", dtype=float)

    @property
    def seconds_per_step(self) -> float:
        """Median over the log intervals, without the first, in which a process warms up; NaN if none is left."""
        rates = [row["steps_per_second"] for row in self.steps if row.get("steps_per_second")]
        return float(pandas().Series([1 / rate for rate in rates[1:] or rates], dtype=float).median())

    @property
    def seconds_per_epoch(self) -> float:
        """Mean wall time of a training pass."""
        return float(pandas().Series(self.seconds, dtype=float).mean())


def is_finished(path: Path, epochs: int | None = None) -> bool:
    """Return whether a run folder holds a run that came to its end; ``epochs`` is the number asked for."""
    rows = read_jsonl(RunDirectory(path).metrics)
    return _is_finished(rows, epochs)


def _is_finished(rows: Sequence[Mapping[str, Any]], epochs: int | None) -> bool:
    asked = [row["epochs"] for row in rows if row["event"] == "run"]
    wanted = epochs or (asked[-1] if asked else 0)
    # A run that goes on has no line of an earlier stop.
    wanted = min([wanted, *(row["epoch"] + 1 for row in rows if row["event"] == "stop")])
    tested = {row["epoch"] for row in rows if row["event"] == "epoch" and row["mode"] == "test"}
    return bool(wanted and rows and rows[-1]["event"] == "end" and tested >= set(range(wanted)))


def read_run(path: Path) -> Run:
    """Return the run in a folder.

    Raises:
        UsageError: It is no run folder, or its log has no beginning.
    """
    run = RunDirectory.open(path)
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    rows = read_jsonl(run.metrics)
    begins = [row for row in rows if row["event"] == "run"]
    if not begins or not isinstance(config, dict):
        raise UsageError(f"{path} has nothing to compare: its {run.metrics.name} has no beginning of a run.")
    about = begins[-1]
    metrics = [(task, name) for task in about["tasks"] for name in about["metrics"][task]]
    known = about.get("better") or {}
    if not known:
        raise UsageError(
            f"The {run.metrics.name} of {path} does not say which metrics are better when higher: it was written by an "
            f"older fastmtl, so train the run again."
        )
    ends = [row["best_epoch"] for row in rows if row["event"] == "end" and row["best_epoch"] is not None]
    epochs = [row for row in rows if row["event"] == "epoch"]
    has_val = any(row["mode"] == "val" for row in epochs)
    memory = [row["peak_memory"] for row in epochs if row.get("peak_memory")]
    return Run(
        path=path,
        config=config,
        tasks=list(about["tasks"]),
        metrics=metrics,
        better=[weight for task in about["tasks"] for weight in known[task]],
        epochs=about["epochs"],
        finished=_is_finished(rows, None),
        scores={mode: _scores(epochs, mode, metrics) for mode in ("train", "val", "test")},
        losses={mode: _losses(epochs, mode, about["tasks"]) for mode in ("train", "val", "test")},
        steps=[row for row in rows if row["event"] == "steps"],
        best_epoch=ends[-1] if ends and has_val and ends[-1] >= 0 else None,
        seconds=[row["seconds"] for row in epochs if row["mode"] == "train" and row["seconds"] is not None],
        peak_memory=max(memory, default=None),
        made_with=about.get("made_with") or {},
    )


def _scores(rows: Iterable[Mapping[str, Any]], mode: str, metrics: Sequence[tuple[str, str]]) -> DataFrame:
    pd = pandas()
    of_mode = {row["epoch"]: row["metric"] for row in rows if row["mode"] == mode}
    table = [[_number(of_epoch[task].get(name)) for task, name in metrics] for of_epoch in of_mode.values()]
    columns = pd.MultiIndex.from_tuples(metrics, names=["task", "metric"])
    return pd.DataFrame(table, index=list(of_mode), columns=columns, dtype=float)


def _losses(rows: Iterable[Mapping[str, Any]], mode: str, tasks: Sequence[str]) -> DataFrame:
    of_mode = {row["epoch"]: row["loss"] for row in rows if row["mode"] == mode}
    table = [[_number(of_epoch.get(task)) for task in tasks] for of_epoch in of_mode.values()]
    return pandas().DataFrame(table, index=list(of_mode), columns=list(tasks), dtype=float)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among folders and directly below them, without those of a tuning.

    Raises:
        UsageError: No such folder, or there is no run in one.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"There is no folder {path}.")
        inside = path / "cells" if (path / "cells").is_dir() else path
        runs = [folder for folder in (path, *sorted(inside.iterdir())) if _is_run(folder)]
        # An experiment of which nothing has begun yet may have failed cells.
        if not runs and not (path / "experiment.yaml").exists():
            raise UsageError(f"{path} holds no run: a run folder has a config.yaml and a metrics.jsonl.")
        found.update(dict.fromkeys(runs))
    return list(found)


def _is_run(folder: Path) -> bool:
    run = RunDirectory(folder)
    return run.config.is_file() and run.metrics.is_file()


def check_alike(runs: Sequence[Run]) -> None:
    """Refuse runs that cannot stand in one table.

    Raises:
        UsageError: They are of several data sets, or have other tasks or metrics.
    """
    by_dataset: dict[str, Run] = {}
    for run in runs:
        by_dataset.setdefault(run.dataset, run)
    if len(by_dataset) > 1:
        named = " and ".join(f"{name} ({run.path})" for name, run in list(by_dataset.items())[:2])
        raise UsageError(f"Runs of different data sets cannot be compared: {named}.")
    for run in runs[1:]:
        if run.metrics != runs[0].metrics or run.better != runs[0].better:
            raise UsageError(
                f"Runs of different tasks or metrics cannot be compared: {runs[0].path} has {_named(runs[0])}, "
                f"{run.path} has {_named(run)}."
            )


def _named(run: Run) -> str:
    return ", ".join(f"{task} {metric}" for task, metric in run.metrics)
