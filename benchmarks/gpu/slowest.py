"""`python -m fastmtl.benchmarks.gpu.slowest kernels-*.csv`: names the two ops furthest from their bound."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

__all__ = ["slowest"]


def slowest(rows: list[dict[str, str]], count: int = 2) -> list[str]:
    """Return the ops with the smallest share of what memory allows, of those that it limits, in any of their cases."""
    shares: dict[str, float] = {}
    for row in rows:
        if row["variant"].startswith("fastmtl") and row.get("share_of_bound"):
            shares[row["op"]] = min(float(row["share_of_bound"]), shares.get(row["op"], float("inf")))
    return sorted(shares, key=shares.__getitem__)[:count]


if __name__ == "__main__":
    table: list[dict[str, str]] = []
    for name in sys.argv[1:]:
        with Path(name).open(newline="") as file:
            table += csv.DictReader(file)
    print(*slowest(table))
