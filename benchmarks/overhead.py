"""What a training step costs the host beyond the network: a tiny network, whose arithmetic takes hardly any time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastmtl.benchmarks.contender import Contender, LocalContender
from fastmtl.benchmarks.gate import ALLOWED, DRAW
from fastmtl.benchmarks.machine import facts
from fastmtl.benchmarks.peers import torchjd_aggregator, torchjd_can, torchjd_step
from fastmtl.benchmarks.runner import spread, time_in_turn
from fastmtl.benchmarks.step import Vjps, floor_step, peer_steps, trainer_step
from fastmtl.benchmarks.tables import write_rows
from fastmtl.benchmarks.work import Work
from torch import Tensor

from fastmtl import balance
from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name
from fastmtl.trainer.setup.checks import find_device
from fastmtl.weighting import WEIGHTINGS

__all__ = ["STRATEGIES", "floor_of", "run_overhead"]

STRATEGIES = ("EW", "MGDA", "PCGrad", "UPGrad", "Nash_MTL", "GradDrop", "MoCo", "FAMO")

Row = dict[str, Any]


def floor_of(work: Work, weighting: str) -> LocalContender:
    """Return the forward passes, VJPs and the optimizer of a strategy, in plain torch."""
    rule = WEIGHTINGS[weighting]
    vjps: Vjps = "sum" if rule.needs == "losses" else "features" if rule.needs == "reps" else "parameters"
    return floor_step(work, vjps, rule.looks_back)


def _loop_step(work: Work, weighting: str) -> LocalContender:
    """Return a step of a plain loop with :func:`fastmtl.balance`."""
    encoder, decoders = work.modules()
    aggregator = torchjd_aggregator(weighting, work.count, "fastmtl")
    shared = list(encoder.parameters())
    optimizer = torch.optim.SGD([*shared, *decoders.parameters()], lr=work.lr, fused=True)

    def step() -> None:
        features = encoder(work.inputs)
        losses = [work.loss(decoders[task](features), task) for task in work.tasks]
        optimizer.zero_grad()
        balance(losses, shared=shared, weighting=aggregator)
        optimizer.step()

    return LocalContender(run=step, shared=shared)


def _contenders(
    work: Work, name: str, peers: Sequence[str], libmtl: Path | None, compile: bool
) -> dict[str, Callable[[], Contender]]:
    make: dict[str, Callable[[], Contender]] = {"fastmtl": partial(trainer_step, work, name, "fp32")}
    if compile:
        make["fastmtl compiled"] = partial(trainer_step, work, name, "fp32", compile=True)
    if torchjd_can("HPS", name):
        make["fastmtl balance"] = partial(_loop_step, work, name)
        make["fastmtl mtl_backward"] = partial(torchjd_step, work, name, "fastmtl")
    make |= peer_steps(work, name, peers, libmtl)
    return make | {"floor": partial(floor_of, work, name), "plain": partial(floor_step, work, "sum")}


def run_overhead(
    weightings: Sequence[str] = STRATEGIES,
    peers: Sequence[str] = (),
    libmtl: Path | None = None,
    tasks: Sequence[int] = (1, 3, 8, 40),
    device: torch.device | str = "cpu",
    compile: bool = False,
    csv_path: Path | None = None,
    seconds: float = 5.0,
) -> list[Row]:
    """Time steps of a tiny network (16-32-32, batch 32) and count what they launch; return one row per contender.

    The floor of a strategy are its forward passes, its VJPs and the optimizer in plain torch; ``plain`` is a loop that
    adds the losses up. ``fastmtl balance`` and ``fastmtl mtl_backward`` are plain loops with our functions. All
    contenders of a strategy run in turn, peers in processes of their own on the CPU. The updates of the first step are
    compared before: ours get no time if nobody else's is within 1 %. Launches are operators that do work on the device.

    Args:
        weightings: Strategies, in any case.
        peers: ``"libmtl"`` and ``"torchjd"``.
        libmtl: Folder of a LibMTL checkout.
        tasks: Numbers of tasks.
        device: Where to run.
        compile: Time our step compiled too.
        csv_path: File to write the rows to.
        seconds: Time for each strategy and number of tasks.

    Raises:
        UsageError: An unknown name, or a peer that is not there.
        BackendError: The device is not there.
    """
    device = find_device(device)
    names = [resolve_name(name, {known: known for known in WEIGHTINGS}, "weighting") for name in weightings]
    if "libmtl" in peers and libmtl is None:
        raise UsageError("The peer libmtl needs the folder of a LibMTL checkout (--libmtl).")
    known = facts(device)
    print("  ".join(f"{key} {value}" for key, value in known.items()))
    rows: list[Row] = []
    for count in tasks:
        work = Work(net="tiny", arch="HPS", count=count, batch=32, size=1, device=device)
        for name in names:
            for row in _compare(name, work, _contenders(work, name, peers, libmtl, compile), seconds):
                print(_line(row), flush=True)
                rows.append(row | known)
            if csv_path is not None:
                write_rows(rows, csv_path)
    return rows


def _compare(name: str, work: Work, make: Mapping[str, Callable[[], Contender]], seconds: float) -> list[Row]:
    contenders: dict[str, Contender] = {}
    updates: dict[str, Tensor] = {}
    for library, build in make.items():
        try:
            step = build()
            # Those of one process draw from one generator; a peer's process has its own.
            if library not in ("floor", "plain") and name not in DRAW:
                updates[library] = step.update()
            contenders[library] = step
        except RuntimeError as cause:
            # LibMTL's MGDA fails with a single task.
            if library not in ("LibMTL", "TorchJD"):
                raise
            print(f"{name:9} T={work.count:<3} {library:20} fails: {str(cause).splitlines()[0]}")
    apart = {library: _least_distance(library, updates) for library in updates}
    # The solvers of peers are coarse with many tasks: ours is wrong if nobody at all makes the same update.
    wrong = {
        library: f"nobody's update is nearer than {distance:.0e}"
        for library, distance in apart.items()
        if library.startswith("fastmtl") and len(updates) > 1 and not distance <= ALLOWED
    }
    right = {library: step for library, step in contenders.items() if library not in wrong}
    # Operators that Inductor has compiled are not dispatched one by one.
    launches = {library: step.launches() for library, step in right.items() if library != "fastmtl compiled"}
    samples = time_in_turn(right, work.device, seconds)
    rows = []
    for library in contenders:
        row: Row = {"strategy": name, "tasks": work.count, "library": library, "distance": apart.get(library)}
        if library in wrong:
            rows.append(row | {"wrong": wrong[library]})
            continue
        row |= spread(samples[library], "us")
        for other in ("plain", "fastmtl"):
            if other in samples:
                pairs = [one / two for one, two in zip(samples[library], samples[other], strict=True)]
                row[f"times_{other}"] = statistics.median(pairs)
        beyond = [one - two for one, two in zip(samples[library], samples["floor"], strict=True)]
        row["beyond_us"] = statistics.median(beyond) * 1e6
        if library in launches:
            row |= {"launches": launches[library], "beyond_launches": launches[library] - launches["floor"]}
        rows.append(row)
    return rows


def _least_distance(library: str, updates: Mapping[str, Tensor]) -> float:
    """Return how far a contender's update is from the nearest one of another, relative to its norm."""
    own = updates[library]
    others = [update for other, update in updates.items() if other != library]
    return min((float((own - update).norm() / own.norm()) for update in others), default=0.0)


def _line(row: Row) -> str:
    head = f"{row['strategy']:9} T={row['tasks']:<3} {row['library']:20}"
    if "wrong" in row:
        return f"{head} WRONG: {row['wrong']}; not timed"
    line = f"{head} {row['median_us']:8.0f} us, {row['beyond_us']:6.0f} beyond the floor"
    if "launches" in row:
        line += f"  {row['launches']:5} launches, {row['beyond_launches']:4} beyond"
    line += f"  {row['times_plain']:5.2f} x plain"
    return line + (f"  {row['times_fastmtl']:5.2f} x fastmtl" if "times_fastmtl" in row else "")
