"""mtl_backward and jac_to_grad beside TorchJD's, on the same graph, in one run."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fastmtl.benchmarks.contender import LocalContender
from fastmtl.benchmarks.machine import facts
from fastmtl.benchmarks.runner import spread, time_in_turn
from fastmtl.benchmarks.tables import write_rows
from fastmtl.benchmarks.work import Work
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.trainer.setup.checks import find_device

__all__ = ["run_autojac"]

# Of the gradient's norm: both work in float32, and TorchJD's Gram matrix is float32 too.
_ALLOWED = 1e-3

Row = dict[str, Any]


def _contender(package: str, work: Work, aggregator: str) -> LocalContender:
    """Return the calls of one package on a graph that is kept, so that no forward pass is among them.

    Raises:
        UsageError: The package is not installed, or has no such aggregator.
    """
    try:
        autojac: Any = importlib.import_module(f"{package}.autojac")
        aggregation: Any = importlib.import_module(f"{package}.aggregation")
    except ImportError:
        raise UsageError(f"{package} is not installed; pip install {package}.") from None
    if not hasattr(aggregation, aggregator):
        raise UsageError(f"aggregator must be one of {package}.aggregation, got {aggregator!r}.")
    aggregate = getattr(aggregation, aggregator)()
    encoder, decoders = work.modules()
    shared, params = list(encoder.parameters()), [*encoder.parameters(), *decoders.parameters()]
    features = encoder(work.inputs)
    losses = [work.loss(decoders[task](features), task) for task in work.tasks]

    def run() -> None:
        for param in params:
            param.grad = None
        autojac.mtl_backward(losses, features=features, retain_graph=True)
        autojac.jac_to_grad(shared, aggregate)

    return LocalContender(run=run, shared=shared)


def _grads(contender: LocalContender) -> Tensor:
    contender.run()
    return torch.cat([param.grad.flatten() for param in contender.shared if param.grad is not None]).double()


def run_autojac(
    tasks: Sequence[int] = (3,),
    net: str = "resnet18",
    aggregator: str = "UPGrad",
    batch: int = 32,
    size: int = 64,
    device: torch.device | str = "cpu",
    csv_path: Path | None = None,
    seconds: float = 20.0,
) -> list[Row]:
    """Time ``mtl_backward`` followed by ``jac_to_grad`` and return one row per number of tasks and library.

    Both run in turn on the graph of one forward pass. Where the gradients of the shared parameters differ by more than
    0.1 % of their norm, ours gets no time.

    Args:
        tasks: Numbers of tasks.
        net: ``"resnet18"`` or ``"mlp"``.
        aggregator: Name of a class of both packages that needs no arguments, and no random numbers.
        batch: Rows of the batch.
        size: Height and width of the images.
        device: Where to run.
        csv_path: File to write the rows to.
        seconds: Time for each number of tasks.

    Raises:
        UsageError: TorchJD is not installed, or an unknown name.
        BackendError: The device is not there.
    """
    device = find_device(device)
    known = facts(device)
    print("  ".join(f"{key} {value}" for key, value in known.items()))
    rows: list[Row] = []
    for count in tasks:
        work = Work(net=net, arch="HPS", count=count, batch=batch, size=size, device=device)
        for row in _compare(work, aggregator, seconds):
            print(_line(row), flush=True)
            rows.append(row | {"net": net, "aggregator": aggregator, "batch": batch, "size": size} | known)
        if csv_path is not None:
            write_rows(rows, csv_path)
    return rows


def _compare(work: Work, aggregator: str, seconds: float) -> list[Row]:
    contenders = {name: _contender(name, work, aggregator) for name in ("fastmtl", "torchjd")}
    ours, theirs = (_grads(contender) for contender in contenders.values())
    distance = float((ours - theirs).norm() / theirs.norm())
    # A NaN is no agreement.
    if not distance <= _ALLOWED:
        del contenders["fastmtl"]
    peaks = {name: contender.peak_bytes() for name, contender in contenders.items()}
    samples = time_in_turn(contenders, work.device, seconds)
    rows = []
    for name in ("fastmtl", "torchjd"):
        row: Row = {"tasks": work.count, "library": name, "distance": distance}
        if name in samples:
            pairs = [their / our for their, our in zip(samples["torchjd"], samples[name], strict=True)]
            row |= spread(samples[name], "ms")
            row |= {"least_ms": min(samples[name]) * 1e3, "peak_mb": peaks[name] / 1e6}
            row["speedup"] = statistics.median(pairs)
        rows.append(row)
    return rows


def _line(row: Row) -> str:
    head = f"T={row['tasks']:<3} {row['library']:8}"
    if "median_ms" not in row:
        return f"{head} WRONG: {row['distance']:.0e} from TorchJD's gradient; not timed"
    return (
        f"{head} {row['median_ms']:9.2f} ms  ({row['p20_ms']:.2f} .. {row['p80_ms']:.2f}, least {row['least_ms']:.2f})"
        f"  {row['speedup']:6.3f} x faster than TorchJD  peak {row['peak_mb']:.0f} MB  distance {row['distance']:.0e}"
    )
