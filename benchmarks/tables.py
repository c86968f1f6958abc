"""Rows of measurements as files: tables and plots."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_kernels", "write_rows"]


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows, which may have different columns, as CSV.

    A benchmark calls this after every case, so that what was measured is not lost if it is killed.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot_kernels(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the rows of the kernel benchmark: shares of the memory's rate, and times of what is not bound by memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "median_us" in row]
    bound = [row for row in timed if "share_of_bound" in row]
    others = [row for row in timed if "share_of_bound" not in row]
    panels = [
        (some, column, label, scale)
        for some, column, label, scale in (
            (bound, "share_of_bound", "share of what the memory allows", "linear"),
            (others, "median_us", "microseconds", "log"),
        )
        if some
    ]
    if not panels:
        return
    tallest = max(len({(row["op"], row["case"], row["dtype"]) for row in some}) for some, *_ in panels)
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(8 * len(panels), 2 + 0.3 * tallest), layout="constrained", squeeze=False
    )
    for axes, (some, column, label, scale) in zip(grid[0], panels, strict=True):
        cases = list(dict.fromkeys((row["op"], row["case"], row["dtype"]) for row in some))
        for variant in dict.fromkeys(row["variant"] for row in some):
            line = [row for row in some if row["variant"] == variant]
            places = [cases.index((row["op"], row["case"], row["dtype"])) for row in line]
            marker = "o" if variant == "fastmtl" else "x"
            axes.plot([row[column] for row in line], places, marker, label=variant)
        axes.set_yticks(range(len(cases)), [" ".join(case) for case in cases], fontsize="small")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.4)
        axes.set(xlabel=label, xscale=scale)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
