"""The training step beside its floor, the plain sum of the losses, LibMTL and TorchJD, in one run."""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from fastmtl.benchmarks.apart import Apart
from fastmtl.benchmarks.contender import Contender, LocalContender
from fastmtl.benchmarks.gate import ALLOWED, DRAW, distances, min_norm_gap, wrong_steps
from fastmtl.benchmarks.machine import facts, probes
from fastmtl.benchmarks.peers import edge_matrices, libmtl_can, libmtl_step, torchjd_can, torchjd_step
from fastmtl.benchmarks.runner import spread, time_in_turn
from fastmtl.benchmarks.tables import write_rows
from fastmtl.benchmarks.work import Work
from torch import Tensor, nn

from fastmtl import Trainer
from fastmtl.architecture import ARCHITECTURES, AbsArchitecture
from fastmtl.engine.labels import are_complete, present_tasks
from fastmtl.errors import UsageError
from fastmtl.loss import CELoss
from fastmtl.metrics import AccMetric
from fastmtl.support.names import resolve_name
from fastmtl.trainer.compile.capture import StepCapture
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.setup.checks import find_device
from fastmtl.weighting import WEIGHTINGS

__all__ = ["PEERS", "floor_step", "peer_steps", "run_step", "task_rows", "task_trainer", "trainer_step"]

PEERS = ("libmtl", "torchjd")
# They make no strategy's update.
_BOUNDS = ("floor", "sum", "NNConv floor")
_LOG_EVERY = 50

Row = dict[str, Any]
Vjps = Literal["sum", "features", "parameters"]


def task_trainer(work: Work, weighting: str, precision: str, **way: Any) -> Trainer:
    """Return a trainer of the work, in the middle of training."""
    decoders = work.modules()[1]
    task_dict = {
        task: {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]} for task in work.tasks
    }
    optim = {"optim": "sgd", "lr": work.lr}
    rep_grad = WEIGHTINGS[weighting].needs == "reps"
    torch.manual_seed(0)
    trainer = Trainer(
        task_dict, weighting, work.arch, lambda: work.modules()[0], decoders, rep_grad, False, optim, None,
        device=work.device, precision=precision, arch_args=work.arch_args, **way,
    )  # fmt: skip
    trainer.model.epoch, trainer.model.epochs = 0, 1
    trainer.model.train()
    trainer.meter.begin()
    return trainer


def trainer_step(work: Work, weighting: str, precision: str, **way: Any) -> LocalContender:
    """Return our step as the trainer runs it, from a batch that lies on the device: metrics and log included."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = task_trainer(work, weighting, precision, **way)
    batches = [(work.inputs, work.labels)] * trainer.step.batches
    buffer, done = StepBuffer(), 0

    def step() -> None:
        nonlocal done
        complete = all(are_complete(trainer.meter.losses, labels) for _, labels in batches)
        present = None if complete else present_tasks(trainer.meter.losses, [labels for _, labels in batches])
        prepared = [trainer.prepared(batch) for batch in batches]
        losses, preds = trainer.step(prepared, buffer, present, complete)
        trainer.meter.update(losses, preds[-1], prepared[-1][1])
        done += 1
        if len(buffer) == _LOG_EVERY:
            buffer.flush(0, done)

    def settled() -> bool:
        capture = trainer.step.capture
        captured = not isinstance(capture, StepCapture) or capture.failed or capture.replays > 0
        return trainer.step.trial.settled and captured

    # What is timed is the way the trainer settles on, from the same start as everybody's; plain SGD remembers nothing.
    start = None if settled() else copy.deepcopy(trainer.model.state_dict())
    while not settled():
        step()
    if start is not None:
        trainer.model.load_state_dict(start)
    return LocalContender(run=step, shared=trainer.step.problem.shared_params)


def floor_step(
    work: Work, vjps: Vjps, looks_back: bool = False, encoder: Callable[[], nn.Module] | None = None
) -> LocalContender:
    """Return one forward pass, VJPs and the optimizer, in plain torch and nothing else.

    Args:
        work: What to train.
        vjps: Those of the sum of the losses, one; of the losses to the features, T, and of their sum through the trunk,
            one; or of each loss to the parameters, T.
        looks_back: A second forward pass follows.
        encoder: Makes the encoder, in place of the work's.
    """
    decoders = work.modules()[1]
    network: Any = ARCHITECTURES[work.arch](
        work.tasks, encoder or (lambda: work.modules()[0]), decoders, False, False, work.device, **work.arch_args
    ).to(work.device)
    shared = list(network.get_share_params())
    optimizer = torch.optim.SGD(network.parameters(), lr=work.lr, fused=True)

    def loss(features: Sequence[Tensor], task: str) -> Tensor:
        return work.loss(decoders[task](network.branch(features, task)), task)

    def step() -> None:
        optimizer.zero_grad()
        features = network.trunk(work.inputs)
        if vjps == "sum":
            torch.stack([loss(features, task) for task in work.tasks]).sum().backward()
            optimizer.step()
            if looks_back:
                with torch.no_grad():
                    after = network.trunk(work.inputs)
                    for task in work.tasks:
                        loss(after, task)
            return
        if vjps == "features":
            sums = [torch.zeros_like(feature) for feature in features]
            for task in work.tasks:
                cut = tuple(feature.detach().requires_grad_(feature.requires_grad) for feature in features)
                loss(cut, task).backward()
                for total, alias in zip(sums, cut, strict=True):
                    if alias.grad is not None:
                        total += alias.grad
            torch.autograd.backward(features, sums)
            optimizer.step()
            return
        for index, task in enumerate(work.tasks):
            cut = tuple(feature.detach().requires_grad_(feature.requires_grad) for feature in features)
            loss(cut, task).backward()
            # A branch need not use all features, nor a task all shared parameters.
            grads = torch.autograd.grad(
                [feature for feature, alias in zip(features, cut, strict=True) if alias.grad is not None],
                shared,
                [alias.grad for alias in cut if alias.grad is not None],
                retain_graph=index + 1 < work.count,
                allow_unused=True,
            )
            # The optimizer moves the shared parameters too, by one task's gradient.
            for param, grad in zip(shared, grads, strict=True):
                param.grad = param.grad if grad is None else grad
        optimizer.step()

    return LocalContender(run=step, shared=shared)


def task_rows(work: Work) -> Tensor:
    """Return the (T, P) gradients at the start, by plain autograd of one loss after the other."""
    decoders = work.modules()[1]
    network: Any = ARCHITECTURES[work.arch](
        work.tasks, lambda: work.modules()[0], decoders, False, False, work.device, **work.arch_args
    ).to(work.device)
    shared, rows = list(network.get_share_params()), []
    for task in work.tasks:
        loss = work.loss(decoders[task](network.branch(network.trunk(work.inputs), task)), task)
        grads = torch.autograd.grad(loss, shared, allow_unused=True)
        rows.append(_flat(grads, shared))
    return torch.stack(rows)


def _flat(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    pairs = zip(grads, params, strict=True)
    return torch.cat([(torch.zeros_like(param) if grad is None else grad).flatten() for grad, param in pairs])


def run_step(
    weightings: Sequence[str],
    peers: Sequence[str] = (),
    libmtl: Path | None = None,
    arch: str = "HPS",
    tasks: Sequence[int] = (3,),
    net: str = "resnet18",
    batch: int = 32,
    size: int | str = 64,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    compile: bool = False,
    cuda_graph: bool = False,
    vjps: Sequence[str] = (),
    csv_path: Path | None = None,
    plot_path: Path | None = None,
    seconds: float = 20.0,
) -> list[Row]:
    """Time training steps and return one row per strategy, number of tasks and library; print them as they come.

    All contenders of a strategy run in turn. The floor is one forward pass, T VJPs of the trunk and the optimizer in
    plain torch; ``sum`` is the step that only adds the losses up, ``NNConv floor`` the floor of nnconv as
    torch_geometric has it, a matrix for each edge. The updates of one step from the same start are compared before,
    with the same random choices for everybody: ours get no time if they are more than 1 % (relative distance) from
    those of all peers, MGDA's if it misses the conditions of the exact solution by as much, a compiled or captured step
    neither if it is as far from our eager one. A peer that is as far from ours is timed and marked, in its line and in
    the column ``update``: it does something else, and its ratio does not compare like with like. Captured steps of
    strategies with random choices draw their own, and are not compared.

    On the CPU each peer has a process of its own, as it has at its users', and no part in the memory that our trainer
    lets a process keep; floor and sum run in ours.

    Peers, floor and sum compute in fp32 whatever the precision of our step is. With bf16 or fp16 the updates that are
    compared are those of our steps in fp32, as rounding alone moves them by more than 1 %.

    Args:
        weightings: Strategies, in any case.
        peers: ``"libmtl"`` and ``"torchjd"``.
        libmtl: Folder of a LibMTL checkout.
        arch: The architecture; floor and sum are for those with a trunk and branches, TorchJD is for HPS.
        tasks: Numbers of tasks.
        net: A network of `Work`.
        batch: Rows of the batch.
        size: Height and width of the images, as a number or ``"288x384"``.
        device: Where to run.
        precision: Of our step alone.
        compile: Time our step compiled too.
        cuda_graph: Time our step captured as a CUDA graph too.
        vjps: Time our step with these ways of computing the gradients too.
        csv_path: File to write the rows to.
        plot_path: File for a plot over the number of tasks.
        seconds: Time for each strategy and number of tasks.

    Raises:
        UsageError: An unknown name, a peer that is not there, or an architecture that shares nothing.
        BackendError: The device is not there.
    """
    device = find_device(device)
    if cuda_graph and device.type != "cuda":
        raise UsageError(f"cuda_graph needs a CUDA GPU, got the device {device}.")
    names = [resolve_name(name, {known: known for known in WEIGHTINGS}, "weighting") for name in weightings]
    peers = [resolve_name(peer, {known: known for known in PEERS}, "peer") for peer in peers]
    arch = resolve_name(arch, {known: known for known in ARCHITECTURES}, "architecture")
    if "libmtl" in peers and libmtl is None:
        raise UsageError("The peer libmtl needs the folder of a LibMTL checkout (--libmtl).")
    known = facts(device)
    print("  ".join(f"{key} {value}" for key, value in known.items()))
    if libmtl is not None and not (libmtl / "LibMTL").is_dir():
        raise UsageError(f"There is no LibMTL in {libmtl}; give the folder of a checkout.")
    rows: list[Row] = []
    for count in tasks:
        work = Work(net=net, arch=arch, count=count, batch=batch, size=size, device=device)
        for name in names:
            make = _our_steps(work, name, precision, compile, cuda_graph, vjps)
            exact = {} if precision == "fp32" else _our_steps(work, name, "fp32", compile, cuda_graph, vjps)
            if ARCHITECTURES[arch].forward is AbsArchitecture.forward:
                make |= {"floor": partial(floor_step, work, "parameters"), "sum": partial(floor_step, work, "sum")}
                if net == "nnconv":
                    by_edge = partial(edge_matrices, work.modules()[0].state_dict())
                    make["NNConv floor"] = partial(floor_step, work, "parameters", encoder=by_edge)
            make |= peer_steps(work, name, peers, libmtl)
            for row in _compare(name, work, make, exact, seconds):
                print(_line(row), flush=True)
                rows.append(row | {"arch": arch, "net": net, "batch": batch, "size": size} | known)
            if csv_path is not None:
                write_rows(rows, csv_path)
    if plot_path is not None:
        _plot(rows, plot_path)
    return rows


def _our_steps(
    work: Work, name: str, precision: str, compile: bool, cuda_graph: bool, vjps: Sequence[str]
) -> dict[str, Callable[[], Contender]]:
    """Return functions that build our steps, by name."""
    ways: dict[str, dict[str, Any]] = {"fastmtl": {}}
    if compile:
        ways["fastmtl compiled"] = {"compile": True}
    if cuda_graph:
        ways["fastmtl captured"] = {"cuda_graph": True}
    # The plain one is what a trainer does that is not told.
    ways |= {f"fastmtl {way}": {"vjps": way} for way in vjps}
    return {library: partial(trainer_step, work, name, precision, **way) for library, way in ways.items()}


def peer_steps(work: Work, name: str, peers: Sequence[str], libmtl: Path | None) -> dict[str, Callable[[], Contender]]:
    """Return functions that build the peers' steps, by name; print a line for each peer that has no such step."""
    steps: dict[str, Callable[[], Contender]] = {}
    if libmtl is not None and "libmtl" in peers and libmtl_can(libmtl, work.arch, name):
        steps["LibMTL"] = partial(libmtl_step, work, name, libmtl)
    if "torchjd" in peers and torchjd_can(work.arch, name):
        steps["TorchJD"] = partial(torchjd_step, work, name)
    if work.device.type == "cpu":
        # Our trainer tells the C library to keep what is freed, in the whole process; see fastmtl/memory.py.
        steps = {library: partial(Apart, library, build) for library, build in steps.items()}
    for peer in peers:
        if peer not in map(str.lower, steps):
            print(f"{name:11} T={work.count:<3} {peer} has no such step on {work.arch} and is left out")
    return steps


def _compare(
    name: str,
    work: Work,
    make: Mapping[str, Callable[[], Contender]],
    exact: Mapping[str, Callable[[], Contender]],
    seconds: float,
) -> list[Row]:
    """Return the rows of what ``make`` builds; the gate takes what ``exact`` builds in its place."""
    contenders = {library: build() for library, build in make.items()}
    ours = contenders["fastmtl"]
    assert isinstance(ours, LocalContender)
    if not ours.shared:
        raise UsageError(f"{work.arch} shares no parameters, so that there is no update to compare.")
    gated = contenders | {library: build() for library, build in exact.items()}
    # A captured step makes the random choices that its graph draws.
    left_out = {*_BOUNDS, "fastmtl captured"} if name in DRAW else {*_BOUNDS}
    apart = distances({library: step for library, step in gated.items() if library not in left_out})
    gap = None
    if name == "MGDA" and ARCHITECTURES[work.arch].forward is AbsArchitecture.forward:
        # Those at hand have made a step, and parameters move by less than their rounding tells.
        fresh = (exact or make)["fastmtl"]()
        fresh()
        assert isinstance(fresh, LocalContender)
        gap = min_norm_gap(_flat([param.grad for param in fresh.shared], fresh.shared), task_rows(work))
    wrong = wrong_steps(apart, gap)
    del gated
    size = 4 * sum(param.numel() for param in ours.shared)
    contenders = {library: step for library, step in contenders.items() if library not in wrong}
    peaks = {library: step.peak_bytes() for library, step in contenders.items()}
    memory = probes(work.device)
    rates: list[tuple[float, float]] = []

    def measure_memory() -> None:
        rates.append((max(measure() for measure in memory.read), max(measure() for measure in memory.copy)))

    samples = time_in_turn(contenders, work.device, seconds, measure_memory)
    read, copy = (statistics.median(rate) for rate in zip(*rates, strict=True))
    # J read twice, the update written once.
    algebra = work.count * size / read + (work.count + 1) * size / copy
    rows = []
    for library in make:
        row: Row = {"strategy": name, "tasks": work.count, "library": library, "distance": apart.get(library)}
        if library in apart:
            row["update"] = "same" if apart[library] <= ALLOWED else "another"
        if library in samples:
            row |= spread(samples[library], "ms")
            row |= {"peak_mb": peaks[library] / 1e6, "algebra_ms": algebra * 1e3}
            for other in ("floor", "fastmtl"):
                if other in samples:
                    pairs = [one / two for one, two in zip(samples[library], samples[other], strict=True)]
                    row[f"times_{other}"] = statistics.median(pairs)
        else:
            row["wrong"] = wrong[library]
        rows.append(row)
    return rows


def _line(row: Row) -> str:
    head = f"{row['strategy']:11} T={row['tasks']:<3} {row['library']:16}"
    if "median_ms" not in row:
        return f"{head} WRONG: {row['wrong']}; not timed"
    line = f"{head} {row['median_ms']:9.2f} ms  ({row['p20_ms']:.2f} .. {row['p80_ms']:.2f})"
    for other in ("floor", "fastmtl"):
        if f"times_{other}" in row:
            line += f"  {row[f'times_{other}']:6.3f} x {other}"
    line += f"  peak {row['peak_mb']:.0f} MB"
    if row["library"] == "floor":
        line += f"  (J read and combined at the memory's rate: {row['algebra_ms']:.2f} ms more)"
    if row["distance"] is None:
        return line
    line += f"  distance {row['distance']:.0e}"
    return line if row["update"] == "same" else f"{line}: ANOTHER UPDATE"


def _plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for strategy, library in dict.fromkeys((row["strategy"], row["library"]) for row in rows):
        line = [row for row in rows if (row["strategy"], row["library"]) == (strategy, library) and "median_ms" in row]
        axes.plot(
            [row["tasks"] for row in line], [row["median_ms"] for row in line], "o-", label=f"{library} {strategy}"
        )
    axes.set(xlabel="tasks", ylabel="milliseconds per step", xscale="log", yscale="log")
    counts = sorted({row["tasks"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
