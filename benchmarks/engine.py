"""Gram matrices of `autogram.Engine` layer by layer, beside those of the Jacobian's rows, on the same graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fastmtl.benchmarks.contender import LocalContender
from fastmtl.benchmarks.machine import facts
from fastmtl.benchmarks.runner import spread, time_in_turn
from fastmtl.benchmarks.tables import write_rows
from fastmtl.benchmarks.work import Work
from torch import Tensor

from fastmtl import ops
from fastmtl.autogram import Engine
from fastmtl.autojac import jac
from fastmtl.trainer.setup.checks import find_device

__all__ = ["run_engine"]

# Of the Gram matrix's norm, in float32.
_ALLOWED = 1e-5

Row = dict[str, Any]


def run_engine(
    tasks: Sequence[int] = (16,),
    net: str = "mlp",
    batch: int = 256,
    size: int = 64,
    device: torch.device | str = "cpu",
    csv_path: Path | None = None,
    seconds: float = 20.0,
) -> list[Row]:
    """Time ``Engine(encoder, batch_dim=None).compute_gramian`` and return two rows per number of tasks.

    It takes turns with ``jac`` followed by ``ops.gram``, on the graph of one forward pass. The engine gets no time
    where its matrix differs by more than 1e-5 of the norm. Its first call, which plans the ways, is not timed.

    Args:
        tasks: Numbers of tasks.
        net: ``"mlp"`` or ``"resnet18"``.
        batch: Rows of the batch.
        size: Height and width of the images.
        device: Where to run.
        csv_path: File to write the rows to.
        seconds: Time for each number of tasks.

    Raises:
        BackendError: The device is not there.
    """
    device = find_device(device)
    known = facts(device)
    print("  ".join(f"{key} {value}" for key, value in known.items()))
    rows: list[Row] = []
    for count in tasks:
        work = Work(net=net, arch="HPS", count=count, batch=batch, size=size, device=device)
        for row in _compare(work, seconds):
            print(_line(row), flush=True)
            rows.append(row | {"net": net, "batch": batch, "size": size} | known)
        if csv_path is not None:
            write_rows(rows, csv_path)
    return rows


def _compare(work: Work, seconds: float) -> list[Row]:
    encoder, decoders = work.modules()
    shared = list(encoder.parameters())
    features = encoder(work.inputs)
    losses = torch.stack([work.loss(decoders[task](features), task) for task in work.tasks])
    engine = Engine(encoder, batch_dim=None)

    def by_rows() -> Tensor:
        jacobians = jac(losses, shared, retain_graph=True)
        return ops.gram([[jacobian[t] for jacobian in jacobians] for t in range(work.count)])

    calls = {"engine": lambda: engine.compute_gramian(losses), "rows": by_rows}
    ours, plain = (call().double() for call in calls.values())
    distance = float((ours - plain).norm() / plain.norm())
    # A NaN is no agreement.
    if not distance <= _ALLOWED:
        del calls["engine"]
    contenders = {name: LocalContender(run=_without_result(call), shared=shared) for name, call in calls.items()}
    peaks = {name: contender.peak_bytes() for name, contender in contenders.items()}
    samples = time_in_turn(contenders, work.device, seconds)
    rows = []
    for name in ("engine", "rows"):
        row: Row = {"tasks": work.count, "way": name, "distance": distance}
        if name in samples:
            ratios = [own / other for own, other in zip(samples[name], samples["rows"], strict=True)]
            row |= spread(samples[name], "ms") | {"peak_mb": peaks[name] / 1e6, "times_rows": statistics.median(ratios)}
        rows.append(row)
    return rows


def _without_result(call: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        call()

    return run


def _line(row: Row) -> str:
    head = f"T={row['tasks']:<3} {row['way']:6}"
    if "median_ms" not in row:
        return f"{head} WRONG: {row['distance']:.0e} from the rows' matrix; not timed"
    return (
        f"{head} {row['median_ms']:9.2f} ms  ({row['p20_ms']:.2f} .. {row['p80_ms']:.2f})  "
        f"{row['times_rows']:6.3f} x rows  peak {row['peak_mb']:.0f} MB  distance {row['distance']:.0e}"
    )
