"""`fastmtl data list`, `fastmtl doctor` and `fastmtl bench`: what there is, and how fast."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["bench_kernels", "bench_solvers", "doctor", "list_benches", "list_data"]


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


def doctor(*, as_json: bool) -> None:
    """Print what the machine, the installation and the backends are like."""
    from fastmtl.doctor import render, report

    facts = report()
    print(json.dumps(facts) if as_json else render(facts))


def bench_kernels(
    ops: Sequence[str] | None, *, device: str, csv_path: Path | None, quick: bool, threads: int | None
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
    rows = run_kernels(ops, device, csv_path, quick)
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


def list_benches() -> None:
    """Print the operators that have a benchmark."""
    from fastmtl.benchmarks.registry import BENCHES

    print("\n".join(BENCHES))
