"""`fastmtl compare`, `fastmtl report` and `fastmtl published`: what the commands do."""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from fastmtl.cli.options import split_values
from fastmtl.errors import UsageError
from fastmtl.experiments.experiment import check_data, load_experiment, run_experiment
from fastmtl.experiments.grid import Grid, read_seeds, read_tuned
from fastmtl.experiments.live import LiveTable
from fastmtl.experiments.own import make_pool
from fastmtl.experiments.published import Published, load_published, names_of_published
from fastmtl.experiments.report import FILES, check_packages, command_line, elsewhere_of, published_table, write_report
from fastmtl.experiments.runner import PROGRAM, Pool, only_one
from fastmtl.experiments.statistics import Selection, describe_selection
from fastmtl.experiments.summary import Summary
from fastmtl.experiments.tables import ResultTable, cost_table, result_table
from fastmtl.recipes import Recipe, find_recipe

__all__ = ["compare", "published", "report"]

_WIDEST = 10_000


def compare(
    *,
    config: Path | None,
    recipe: str | None,
    scale: str | None,
    arch: str | None,
    weighting: str | None,
    seeds: str | None,
    stl: bool | None,
    tune: str | None,
    out: Path | None,
    jobs: int | None,
    devices: str | None,
    ray: str | None,
    last: int | None,
    best: bool,
    retry: bool,
    published: str | None,
    **values: Any,
) -> None:
    """Run the command, whose options ``fastmtl compare --help`` describes.

    Raises:
        FastmtlError: Something cannot be as asked.
        typer.Exit: Ctrl-C, with exit code 130.
    """
    check_packages()
    found = None if recipe is None else find_recipe(recipe)
    rows = _published_rows(published, found)
    selection = _selection(last, best, found)
    grid = _grid(config, found, scale, arch=arch, weighting=weighting, seeds=seeds, stl=stl, tune=tune, values=values)
    check_data(grid)
    folder = grid.default_folder() if out is None else out
    if (folder / PROGRAM).exists():
        raise UsageError(f"{folder} holds an experiment of fastmtl.compare in Python: give another folder (--out).")
    pool, threads = _pool(ray, jobs, _words(devices))
    with only_one(folder), contextlib.closing(pool):
        try:
            run_experiment(
                grid,
                folder,
                pool,
                LiveTable,
                threads=threads,
                command=command_line(["fastmtl", *sys.argv[1:]]),
                selection=selection,
                retry=retry,
            )
        except KeyboardInterrupt:
            print(f"interrupted: the runs are in {folder}; the same command goes on with them", file=sys.stderr)
            raise typer.Exit(130) from None
        experiment = load_experiment([folder])
        summary = write_report(experiment, selection, published=rows)
    _tell(summary, selection, folder, len(experiment.missing))


def _published_rows(name: str | None, recipe: Recipe | None) -> Published | None:
    """Return the published rows of a name, or else those of the recipe."""
    name = recipe.published if name is None and recipe is not None else name
    return None if name is None else load_published(name)


def _selection(last: int | None, best: bool, recipe: Recipe | None) -> Selection:
    """Return the epochs that count: as the flags say, or else the recipe."""
    if recipe is not None and last is None and not best:
        return Selection(best=True) if recipe.selection == "best" else Selection(last=int(recipe.selection))
    return Selection(last=10 if last is None else last, best=best)


def _content(config: Path | None, recipe: Recipe | None, scale: str | None) -> dict[str, Any]:
    if recipe is None:
        if scale is not None:
            raise UsageError("--scale is that of a recipe: give --recipe.")
        return {} if config is None else _read_yaml(config)
    if config is not None:
        raise UsageError("--config and --recipe both say how to train: give one of them.")
    return recipe.at(scale)


def _grid(
    config: Path | None,
    recipe: Recipe | None = None,
    scale: str | None = None,
    *,
    arch: str | None,
    weighting: str | None,
    seeds: str | None,
    stl: bool | None,
    tune: str | None,
    values: Mapping[str, Any],
) -> Grid:
    """Return the grid of a YAML file or recipe, and of flags, which win."""
    settings, hyper = split_values(values)
    content = _content(config, recipe, scale)
    of_file = {name: content.pop(name, None) for name in ("arch", "weighting", "seeds", "stl", "tune")}
    tuned = of_file["tune"] or {}
    if not isinstance(tuned, Mapping):
        raise UsageError(f"tune in {config} must be a mapping of settings to lists of values, got {tuned!r}.")
    given = _words(seeds)
    numbers: Any = given if len(given) > 1 else (given[0] if given else of_file["seeds"])
    return Grid.of(
        archs=_words(arch) or _listed(of_file["arch"], "HPS"),
        weightings=_words(weighting) or _listed(of_file["weighting"], "EW"),
        seeds=read_seeds(3 if numbers is None else numbers),
        settings={**content, **settings},
        hyper=hyper,
        tune={**tuned, **read_tuned(tune or "")},
        baseline=stl if stl is not None else of_file["stl"] is not False,
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as cause:
        raise UsageError(f"The configuration file {path} cannot be read: {cause.strerror}.") from cause
    except (UnicodeDecodeError, yaml.YAMLError) as cause:
        raise UsageError(f"The configuration file {path} is not valid YAML: {' '.join(str(cause).split())}.") from cause
    if not isinstance(content, dict):
        raise UsageError(f"The configuration file {path} must hold `key: value` lines, got a {type(content).__name__}.")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def _words(text: str | None) -> list[str]:
    return [] if text is None else [word for word in text.split(",") if word]


def _listed(value: Any, default: str) -> Sequence[Any]:
    if value is None:
        return [default]
    return value if isinstance(value, list) else [value]


def _pool(ray: str | None, jobs: int | None, devices: Sequence[str]) -> tuple[Pool, int]:
    if ray is None:
        return make_pool(jobs, devices)
    if jobs is not None or devices:
        raise UsageError("With --ray the cluster shares out processors and devices: leave out --jobs and --devices.")
    from fastmtl.experiments.on_ray import RayPool

    pool = RayPool(ray)
    return pool, pool.threads


def _tell(summary: Summary, selection: Selection, folder: Path, missing: int) -> None:
    """Print the table, and where the rest is."""
    console = _print_table(result_table(summary))
    _print_table(cost_table(summary))
    console.print(f"The {describe_selection(summary.runs, selection)}.")
    for name, row in summary.tests.iterrows():
        console.print(f"  {name}: {row['verdict']}")
    if missing:
        console.print(f"{missing} runs have no results; the report says why.")
    print(f"Report: {folder / FILES[0]} ({', '.join(FILES[1:])} beside it)")


def _print_table(table: ResultTable) -> Console:
    """Print a table, whole however narrow the terminal; return the console of what is printed after it."""
    console, shown = Console(), _rich(table)
    needed = Measurement.get(console, console.options.update(max_width=_WIDEST), shown).maximum
    Console(width=max(console.width, needed)).print(shown)
    return console


def _rich(table: ResultTable) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("method")
    arrows = {"up": " ↑", "down": " ↓", "": ""}
    for column in table.columns:
        group = "" if column.group in ("Overall", "Cost") else f"{column.group}\n"
        shown.add_column(f"{group}{column.name}{arrows[column.better]}", justify="right", vertical="bottom")
    styles = {0: "{}", 1: "[bold]{}[/bold]", 2: "[underline]{}[/underline]"}
    for name, cells in table.rows:
        mark = f" ({table.marks[name]})" if name in table.marks else ""
        texts = [
            styles[cell.place].format(cell.text) + cell.note + (f" [dim]± {cell.spread}[/dim]" if cell.spread else "")
            for cell in cells
        ]
        shown.add_row(name + mark, *texts)
    return shown


def report(runs: Sequence[Path], *, out: Path | None, last: int, best: bool, published: str | None) -> None:
    """Run the command, whose options ``fastmtl report --help`` describes.

    Raises:
        UsageError: No runs, or runs that cannot stand in one table.
    """
    rows = None if published is None else load_published(published)
    selection = Selection(last=last, best=best)
    experiment = load_experiment(runs)
    folder = experiment.folder if out is None else out
    summary = write_report(experiment, selection, folder=folder, published=rows)
    _tell(summary, selection, folder, len(experiment.missing))


def published(name: str | None, *, as_csv: bool) -> None:
    """Run the command, whose options ``fastmtl published --help`` describes.

    Raises:
        UsageError: There are no published rows of the data set.
    """
    if name is None:
        print(f"There are published rows of {', '.join(names_of_published())}: fastmtl published NAME")
        return
    rows = load_published(name)
    if as_csv:
        _print_csv(rows)
        return
    console = _print_table(published_table(rows, marks=rows.source))
    for note in rows.notes():
        console.print(note)
    if rows.elsewhere:
        console.print(elsewhere_of(rows))


def _print_csv(rows: Any) -> None:
    table = rows.table()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        ["method", *(f"{task}/{metric}" for task, metric in rows.values.columns), "delta_m", "mean_rank", "source"]
    )
    for method, (delta, rank) in table.iterrows():
        cells = [f"{rows.values.loc[method, key]:g}" for key in rows.values.columns]
        writer.writerow([method, *cells, f"{delta:.4f}", "" if rank != rank else f"{rank:.4f}", rows.source[method]])
