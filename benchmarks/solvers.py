"""From the Gram matrix to the weights: our strategies beside LibMTL's and TorchJD's solvers of the same problem."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastmtl.benchmarks.machine import facts
from fastmtl.benchmarks.peers import libmtl_solvers, torchjd_solvers
from fastmtl.benchmarks.runner import spread, time_in_turn
from fastmtl.benchmarks.tables import write_rows
from torch import Tensor

from fastmtl import ops
from fastmtl.ops._registry import OPS
from fastmtl.support.hyper import fill_hyper
from fastmtl.weighting import WEIGHTINGS

__all__ = ["STRATEGIES", "run_solvers"]

STRATEGIES = ("MGDA", "PCGrad", "CAGrad", "Nash_MTL", "FairGrad", "UPGrad")
_SIZES = (3, 8, 40)
# Orders are drawn at random, so each solver has its own update.
_RANDOM = ("PCGrad",)
_ALLOWED = 1e-6

Row = dict[str, Any]


def _jacobian(size: int) -> Tensor:
    """Return (T, T) gradients that conflict, with lengths from 0.3 to 3."""
    generator = torch.Generator().manual_seed(size)
    lengths = torch.logspace(-0.5, 0.5, size, dtype=torch.float64)
    return torch.randn(size, size, dtype=torch.float64, generator=generator) * lengths[:, None]


def _ours(name: str, gram: Tensor) -> Callable[[], Tensor]:
    rule: Any = type("Alone", (WEIGHTINGS[name],), {})()
    rule.task_num, rule.rep_grad = len(gram), False
    rule.init_param()
    losses, hyper = torch.ones(len(gram)), fill_hyper(name, rule.hyper, {})

    def solve() -> Tensor:
        weights: Tensor = rule.weigh(losses, gram, **hyper).shared
        return weights

    return solve


def _distance(update: Tensor, exact: Tensor) -> float:
    """Return how far apart two directions are, from 0 to 2."""
    return float((update.double() / update.double().norm() - exact / exact.norm()).norm())


def _exact(name: str, gram: Tensor) -> Tensor:
    """Return the strategy's weights with all ops by their references."""
    references: dict[str, Any] = {op: ops.implementation(op, "reference") for op in OPS if hasattr(ops, op)}
    with mock.patch.multiple(ops, **references):
        return _ours(name, gram)()


def run_solvers(libmtl: Path | None = None, csv_path: Path | None = None, seconds: float = 1.0) -> list[Row]:
    """Time the solvers and return one row per strategy, number of tasks and library; print them as they come.

    Ours gets a time only where its direction is that of the references to 1e-6. A peer's distance from it is shown:
    their solvers stop early, or work in float32.

    Args:
        libmtl: Folder of a LibMTL checkout; without it LibMTL is left out, as TorchJD is where it is not installed.
        csv_path: File to write the rows to.
        seconds: Time for each strategy and number of tasks.
    """
    known = facts(torch.device("cpu"))
    print("  ".join(f"{key} {value}" for key, value in known.items()))
    rows: list[Row] = []
    for size in _SIZES:
        jacobian = _jacobian(size)
        gram, narrow = jacobian @ jacobian.T, jacobian.float()
        torchjd = torchjd_solvers(size)
        peers = {} if libmtl is None else libmtl_solvers(libmtl, size)
        for name in STRATEGIES:
            calls: dict[str, Callable[[], Tensor]] = {"fastmtl": _ours(name, gram)}
            if name in torchjd:
                calls["TorchJD"] = partial(torchjd[name], jacobian)
            if name in peers:
                calls["LibMTL"] = partial(peers[name], narrow)
            exact = _exact(name, gram) @ jacobian
            distances = {}
            for library, call in calls.items():
                result = call()
                distances[library] = _distance(result if library == "LibMTL" else result @ jacobian, exact)
            if name not in _RANDOM and not distances["fastmtl"] <= _ALLOWED:
                del calls["fastmtl"]
            samples = time_in_turn(calls, torch.device("cpu"), seconds)
            for library, distance in distances.items():
                row: Row = {"strategy": name, "tasks": size, "library": library}
                row["distance"] = None if name in _RANDOM else distance
                if library in samples:
                    row |= spread(samples[library], "us")
                    if "fastmtl" in samples:
                        row["times_ours"] = statistics.median(samples[library]) / statistics.median(samples["fastmtl"])
                print(_line(row), flush=True)
                rows.append(row | known)
            if csv_path is not None:
                write_rows(rows, csv_path)
    return rows


def _line(row: Row) -> str:
    head = f"{row['strategy']:9} T={row['tasks']:<3} {row['library']:8}"
    distance = "random" if row["distance"] is None else f"{row['distance']:.0e}"
    if "median_us" not in row:
        return f"{head} WRONG: {distance} from the reference; not timed"
    times = f"  {row['times_ours']:7.1f} x ours" if "times_ours" in row else ""
    return (
        f"{head} {row['median_us']:11.1f} us  ({row['p20_us']:.1f} .. {row['p80_us']:.1f}){times}  distance {distance}"
    )
