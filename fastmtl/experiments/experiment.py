"""An experiment in its folder: what was asked for, its tuning, its cells, what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fastmtl.data import find_dataset
from fastmtl.errors import UsageError
from fastmtl.experiments.grid import Cell, Grid
from fastmtl.experiments.reading import Run, check_alike, find_runs, read_run
from fastmtl.experiments.runner import Pool, Watcher, work_off
from fastmtl.experiments.statistics import Selection
from fastmtl.experiments.tuning import Choice, choose
from fastmtl.support.named import short_name
from fastmtl.trainer.run.directory import write_atomically

__all__ = ["Experiment", "Missing", "Tuning", "check_data", "load_experiment", "run_experiment"]

MANIFEST = "experiment.yaml"
Table = Callable[[str, Sequence[Cell]], AbstractContextManager[Watcher]]


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A run that there are no results of: the name of its folder, its method and seed, and why."""

    name: str
    arch: str
    weighting: str
    args: Mapping[str, Any]
    seed: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How settings were chosen: the seed of its runs, and for each method what was tried and chosen."""

    seed: int
    settings: Mapping[str, Sequence[Any]]
    methods: Mapping[str, Mapping[str, Any]]


@dataclass(kw_only=True)
class Experiment:
    """What a report is made of.

    Attributes:
        folder: Where the report goes by default.
        runs: The finished runs.
        missing: What there is nothing of, or not all.
        commands: What was run.
        tuning: How settings were chosen, None if they were not.
    """

    folder: Path
    runs: list[Run]
    missing: list[Missing] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    tuning: Tuning | None = None


def run_experiment(
    grid: Grid,
    folder: Path,
    pool: Pool,
    table: Table,
    *,
    threads: int,
    command: str,
    selection: Selection,
    retry: bool = False,
) -> None:
    """Run the cells of a grid that are not done yet, after its tuning; the caller holds the folder.

    Raises:
        UsageError: The folder holds an experiment with other settings.
    """
    manifest = _manifest(grid, folder, threads, command, selection)
    write_manifest(folder, manifest)
    grid = replace(grid, base=replace(grid.base, threads=manifest["threads"]))
    chosen: dict[str, Mapping[str, Any]] = {method.name: {} for method in grid.methods}
    if grid.tune:
        tuning = grid.tuning_cells(folder)
        with table("tuning", tuning) as watcher:
            work_off(tuning, pool, watcher, retry=retry)
        choices = choose(grid, tuning, selection)
        manifest["tuning"] = {
            "seed": grid.tuning_seed,
            "settings": {name: list(values) for name, values in grid.tune.items()},
            "methods": {**(manifest.get("tuning") or {}).get("methods", {}), **{c.method: _told(c) for c in choices}},
        }
        chosen = {choice.method: choice.chosen for choice in choices if choice.chosen is not None}
    cells = grid.cells(folder, chosen)
    known = {cell["name"]: cell for cell in manifest["cells"]}
    for cell in grid.cells(folder, {method.name: {} for method in grid.methods}):
        known[cell.name] = {
            "name": cell.name,
            "arch": cell.method.arch,
            "weighting": cell.method.weighting,
            "args": dict(cell.method.args),
            "seed": cell.config.seed,
            "method": cell.method.name,
        }
    manifest["cells"] = list(known.values())
    write_manifest(folder, manifest)
    with table("runs", cells) as watcher:
        work_off(cells, pool, watcher, retry=retry)


def _told(choice: Choice) -> dict[str, Any]:
    tried = [{name: _plain(value) for name, value in row.items()} for row in choice.tried.to_dict(orient="records")]
    chosen = None if choice.chosen is None else dict(choice.chosen)
    return {"chosen": chosen, "tried": tried, "reason": choice.reason}


def _plain(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    return None if plain != plain else plain


def _manifest(grid: Grid, folder: Path, threads: int, command: str, selection: Selection) -> dict[str, Any]:
    settings = grid.settings()
    if grid.tune:
        settings["selection"] = {"last": selection.last, "best": selection.best}
    before = read_manifest(folder)
    if before is None:
        return {"threads": threads, "commands": [command], "settings": settings, "cells": []}
    held = before["settings"]
    flat, flat_held = _flat(settings), _flat(held)
    for name in sorted(flat.keys() | flat_held.keys()):
        if flat.get(name) != flat_held.get(name):
            raise UsageError(
                f"{folder} holds an experiment with {name} = {flat_held.get(name)}, not {flat.get(name)}: give another "
                f"folder (--out), or the same settings; methods and seeds may be added."
            )
    commands = before["commands"] + ([] if command in before["commands"] else [command])
    return {**before, "commands": commands}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    # As YAML gives it back.
    plain = yaml.safe_load(yaml.safe_dump(dict(settings)))
    return {**plain.pop("base"), **plain}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what an experiment's folder says of it, None if it is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write what an experiment's folder says of it."""
    write_atomically(folder / MANIFEST, yaml.safe_dump(dict(manifest), sort_keys=False, allow_unicode=True))


def check_data(grid: Grid) -> None:
    """Refuse what the data set cannot do, before any cell runs into it.

    Raises:
        UsageError: An unknown data set, or a tuning without a validation split.
    """
    info = find_dataset(grid.base.dataset).value
    # A data set of the user's need not say which splits it has.
    if grid.tune and info.rows and "val" not in info.rows:
        raise UsageError(f"tune chooses by the validation split, which the data set {info.name} does not have.")


def load_experiment(paths: Sequence[Path]) -> Experiment:
    """Return the runs in folders: an experiment's, or any run folders.

    Raises:
        UsageError: No runs, or runs that cannot stand in one table.
    """
    runs = [read_run(path) for path in find_runs(paths)]
    check_alike(runs)
    experiment = Experiment(folder=paths[0] if len(paths) == 1 else Path("report"), runs=[])
    for run in runs:
        if run.finished:
            experiment.runs.append(run)
        else:
            done = len(run.scores["test"])
            reason = f"unfinished: {done} of {run.epochs} epochs are done"
            args = {**run.config.get("arch_args", {}), **run.config.get("weight_args", {})}
            experiment.missing.append(
                Missing(
                    name=run.path.name, arch=run.arch, weighting=run.weighting, args=args, seed=run.seed, reason=reason
                )
            )
    for path in paths:
        manifest = read_manifest(path)
        if manifest is not None:
            _add(experiment, path, manifest)
            # In the order of the grid; runs of other folders come after.
            order = {path / "cells" / cell["name"]: place for place, cell in enumerate(manifest["cells"])}
            experiment.runs.sort(key=lambda run: order.get(run.path, len(order)))
    if not experiment.runs:
        why = f": {experiment.missing[0].reason}" if experiment.missing else ""
        raise UsageError(f"{paths[0]} holds no finished run{why}.")
    return experiment


def _add(experiment: Experiment, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Add what an experiment's folder says besides its runs."""
    experiment.commands += manifest["commands"]
    tuning = manifest.get("tuning")
    if tuning is not None:
        experiment.tuning = Tuning(**tuning)
    there = {run.path.name for run in experiment.runs}
    unfinished = {entry.name: entry for entry in experiment.missing}
    for cell in manifest["cells"]:
        if cell["name"] in there:
            continue
        half = unfinished.get(cell["name"])
        if half is not None:
            experiment.missing.remove(half)
        reason = _reason(folder, cell, tuning) or (half.reason if half is not None else "not run yet")
        about = {name: cell[name] for name in ("name", "args", "seed")}
        about |= {name: short_name(cell[name]) for name in ("arch", "weighting")}
        experiment.missing.append(Missing(**about, reason=reason))


def _reason(folder: Path, cell: Mapping[str, Any], tuning: Mapping[str, Any] | None) -> str | None:
    failure = folder / "failed" / f"cells-{cell['name']}.json"
    if failure.is_file():
        return str(yaml.safe_load(failure.read_text(encoding="utf-8"))["reason"])
    tried = (tuning or {}).get("methods", {}).get(cell["method"])
    if tried is not None and tried["chosen"] is None:
        return f"its tuning failed: {tried['reason']}"
    return None
