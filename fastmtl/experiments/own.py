"""`fastmtl.compare`: an experiment on data, decoders, architectures and strategies of one's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastmtl.data import DataBundle
from fastmtl.errors import UsageError
from fastmtl.experiments.experiment import load_experiment, run_experiment
from fastmtl.experiments.grid import Grid, read_seeds
from fastmtl.experiments.live import LiveTable
from fastmtl.experiments.program import Problem, Program, load_problem, save_program
from fastmtl.experiments.report import check_packages, write_report
from fastmtl.experiments.runner import PROGRAM, Here, Pool, Processes, only_one
from fastmtl.experiments.statistics import Selection
from fastmtl.experiments.summary import Summary

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Problem", "Results", "compare", "make_pool"]

# What the data of `make_data` decide.
_OF_DATA = (
    "dataset",
    "dataset_path",
    "train_size",
    "aug",
    "batch_size",
    "test_batch_size",
    "encoder",
    "pretrained",
    "multi_input",
)


_DELTA, _RANK = ("all", "delta_m"), ("all", "mean_rank")


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a comparison has come to.

    Attributes:
        folder: The experiment's folder, with ``report.html``, ``results.csv``, ``results.md`` and ``table.tex``.
        table: A row per method: the mean of every (task, metric) over the seeds, and ``("all", "delta_m")`` in percent
            and ``("all", "mean_rank")``.
        runs: A row per run, by (method, seed): every (task, metric) and ``("all", "delta_m")``.
        tests: A row per method: its paired test against EW.
        missing: Cells without results, with their reasons.
    """

    folder: Path
    table: DataFrame
    runs: DataFrame
    tests: DataFrame
    missing: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, summary: Summary, missing: Sequence[str]) -> Results:
        """Return the results of a report's numbers."""
        table, runs = summary.means.copy(), summary.values.copy()
        # Frames with two levels of columns: (task, metric).
        table[_DELTA] = summary.delta_m.groupby(level="method", sort=False).mean()
        table[_RANK] = summary.mean_rank
        runs[_DELTA] = summary.delta_m
        return cls(folder=folder, table=table, runs=runs, tests=summary.tests, missing=list(missing))


def compare(
    make_data: Callable[[int], Problem | DataBundle],
    *,
    archs: Sequence[Any] = ("HPS",),
    weightings: Sequence[Any] = ("EW",),
    seeds: int | Sequence[int] = 3,
    out: str | Path | None = None,
    jobs: int | None = None,
    devices: Sequence[str] = (),
    stl: bool = True,
    tune: Mapping[str, Sequence[Any]] | None = None,
    last: int = 10,
    best: bool = False,
    retry: bool = False,
    **settings: Any,
) -> Results:
    """Train every architecture with every strategy and seed, write a report, and return its numbers.

    Called again with the same arguments it goes on where it was stopped. Each run has a process of its own, to which
    ``make_data`` is sent, so a script needs no ``if __name__ == "__main__"``.

    Args:
        make_data: Given the seed, returns a `Problem` or a `DataBundle`. It is called once in each run, after the
            random numbers have been seeded.
        archs: Names or classes of architectures; ``{"name": ..., hyper-parameter: value}`` gives one its own.
        weightings: The same of strategies.
        seeds: A number n for 0 to n - 1, or the seeds.
        out: The experiment's folder; ``runs/compare-own-<digest of the arguments>`` if not given. ``make_data`` is not
            in the digest: give another folder for other data.
        jobs: Runs at a time; 0 runs them in this process, to debug.
        devices: Devices such as ``"cuda:1"``; every GPU, or else the CPU, if not given.
        stl: Train the single-task baseline too.
        tune: Settings to choose on the validation split, such as ``{"lr": [1e-4, 1e-3]}``.
        last: Report the mean of the last epochs, this many.
        best: Report the best epoch by the validation split instead.
        retry: Try failed runs again whatever the reason.
        **settings: Settings of all runs as of `fastmtl train`: ``epochs``, ``lr``, ``optim``, ...

    Raises:
        UsageError: An argument cannot be used as given, or no run has come to its end.
    """
    refused = [name for name in _OF_DATA if name in settings]
    if refused:
        raise UsageError(f"{', '.join(refused)} is for make_data to decide.")
    if not callable(make_data):
        raise UsageError(f"make_data must be a function of the seed, got a {type(make_data).__name__}.")
    check_packages()
    selection = Selection(last=last, best=best)
    grid = Grid.of(
        archs=archs,
        weightings=weightings,
        seeds=read_seeds(seeds),
        settings={"dataset": "own", **settings},
        tune=tune,
        baseline=stl,
    )
    folder = grid.default_folder() if out is None else Path(out)
    pool, threads = make_pool(jobs, devices)
    if grid.tune and load_problem(make_data, grid.tuning_seed).val is None:
        raise UsageError("tune chooses by the validation split, which the data of make_data do not have.")
    with only_one(folder), contextlib.closing(pool):
        program = Program(make_data=make_data, methods={method.name: method for method in grid.methods})
        save_program(program, folder / PROGRAM)
        called = f"fastmtl.compare(archs={list(archs)!r}, weightings={list(weightings)!r}, seeds={seeds!r}, ...)"
        run_experiment(grid, folder, pool, LiveTable, threads=threads, command=called, selection=selection, retry=retry)
        experiment = load_experiment([folder])
        summary = write_report(experiment, selection)
    missing = [f"{entry.arch} {entry.weighting}, seed {entry.seed}: {entry.reason}" for entry in experiment.missing]
    return Results.of(folder, summary, missing)


def make_pool(jobs: int | None, devices: Sequence[str]) -> tuple[Pool, int]:
    """Return the pool of processes of this machine, and the CPU threads of each.

    Raises:
        UsageError: A negative number of jobs.
    """
    if jobs is not None and jobs < 0:
        raise UsageError(f"jobs must be at least 0, got {jobs}.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    named = list(devices)
    if not named and torch.cuda.is_available():
        named = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if jobs == 0:
        return Here(named[0] if named else ""), max(1, torch.get_num_threads())
    # A process that trains a large network needs gigabytes: no more of them than most machines can hold.
    count = jobs or len(named) or min(cores, 4)
    slots = [named[place % len(named)] if named else "" for place in range(count)]
    threads = max(1, cores // count)
    return Processes(slots, threads), threads
