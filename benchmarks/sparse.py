"""Steps of a network with one large embedding table: beside a plain loop, and beside the floor."""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastmtl.benchmarks.contender import LocalContender
from fastmtl.benchmarks.machine import facts
from fastmtl.benchmarks.runner import spread, time_in_turn
from fastmtl.benchmarks.tables import write_rows
from torch import Tensor, nn

from fastmtl import Trainer
from fastmtl.errors import UsageError
from fastmtl.loss import BCELoss
from fastmtl.metrics import LogLossMetric
from fastmtl.support.memory import zeros_in_huge_pages
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.setup.checks import find_device

__all__ = ["OPTIMIZERS", "STRATEGIES", "run_sparse"]

STRATEGIES = ("EW", "MGDA", "PCGrad", "UPGrad")
OPTIMIZERS = ("sgd", "sparseadam")
_HIDDEN, _LR = 64, 1e-3
_BATCHES = 16
# Of the gradient's norm, in float32.
_ALLOWED = 1e-5
_GATE_ROWS = 50_000

Row = dict[str, Any]
Batch = tuple[Tensor, dict[str, Tensor]]
Step = Callable[[], None]


class _Encoder(nn.Module):
    """Bags of ids in a table, and a layer."""

    def __init__(self, table: nn.EmbeddingBag) -> None:
        super().__init__()
        self.table = table
        self.layer = nn.Linear(table.embedding_dim, _HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (B, 64)."""
        return torch.relu(self.layer(self.table(ids)))


class _Problem:
    """A table, heads and batches that contenders share.

    Each contender has its own layers, and moves the one table: what a step costs does not depend on the numbers. With
    ``huge`` the moments lie in huge pages, as those that our optimizer makes do; the table does once a trainer has it.
    """

    def __init__(
        self, rows: int, dim: int, batch: int, ids: int, tasks: int, sparse: bool, device: torch.device, huge: bool
    ) -> None:
        self.zeros = zeros_in_huge_pages if huge else torch.zeros_like
        self.tasks = [f"task{t}" for t in range(tasks)]
        self.table = nn.EmbeddingBag(rows, dim, sparse=sparse, device=device)
        generator = torch.Generator().manual_seed(0)

        def drawn() -> Batch:
            inputs = torch.randint(rows, (batch, ids), generator=generator)
            labels = {task: torch.randint(2, (batch, 1), generator=generator).float() for task in self.tasks}
            return inputs.to(device), {task: label.to(device) for task, label in labels.items()}

        self.batches = [drawn() for _ in range(_BATCHES)]
        self.device = device
        self.moments: list[Tensor] = []

    def network(self) -> tuple[_Encoder, nn.ModuleDict]:
        """Return an encoder and heads with the same numbers for everybody."""
        torch.manual_seed(0)
        encoder = _Encoder(self.table)
        heads = nn.ModuleDict({task: nn.Linear(_HIDDEN, 1) for task in self.tasks})
        return encoder.to(self.device), heads.to(self.device)

    def share_moments(self, optimizer: torch.optim.Optimizer, step: int | Tensor) -> None:
        """Let all optimizers keep their moments of the table in the same memory."""
        weight = self.table.weight
        if not self.moments:
            self.moments = [self.zeros(weight.detach()) for _ in range(2)]
        optimizer.state[weight] = {"step": step, "exp_avg": self.moments[0], "exp_avg_sq": self.moments[1]}


def _optimizers(problem: _Problem, optim: str, encoder: _Encoder, heads: nn.ModuleDict) -> list[torch.optim.Optimizer]:
    rest = [*encoder.layer.parameters(), *heads.parameters()]
    if optim == "sgd":
        return [torch.optim.SGD([problem.table.weight, *rest], lr=_LR)]
    sparse = torch.optim.SparseAdam([problem.table.weight], lr=_LR)
    problem.share_moments(sparse, 0)
    return [sparse, torch.optim.Adam(rest, lr=_LR)]


def _loop(problem: _Problem, optim: str, floor: bool) -> Step:
    """Return a step of a plain loop, or the floor: one forward pass, T backward passes and the optimizer."""
    encoder, heads = problem.network()
    optimizers = _optimizers(problem, optim, encoder, heads)
    shared, loss_of = list(encoder.parameters()), nn.BCEWithLogitsLoss()
    count = 0

    def run() -> None:
        nonlocal count
        inputs, labels = problem.batches[count % _BATCHES]
        count += 1
        for optimizer in optimizers:
            optimizer.zero_grad()
        features = encoder(inputs)
        losses = [loss_of(heads[task](features), labels[task]) for task in problem.tasks]
        if not floor:
            torch.stack(losses).sum().backward()
        else:
            for loss, head in zip(losses, heads.values(), strict=True):
                params = [*shared, *head.parameters()]
                grads = torch.autograd.grad(loss, params, retain_graph=loss is not losses[-1])
                # The optimizer gets the last task's gradients; those of the others are made, and dropped.
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
        for optimizer in optimizers:
            optimizer.step()

    return run


def _trainer(problem: _Problem, optim: str, weighting: str, lr: float = _LR) -> Trainer:
    encoder, heads = problem.network()
    kind = {"metrics": ["log loss"], "weight": [0]}
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            task_dict={task: {**kind, "metrics_fn": LogLossMetric(), "loss_fn": BCELoss()} for task in problem.tasks},
            weighting=weighting,
            architecture="HPS",
            encoder_class=lambda: encoder,
            decoders=heads,
            rep_grad=False,
            multi_input=False,
            optim_param={"optim": optim, "lr": lr},
            scheduler_param=None,
            device=str(problem.device),
        )
    if optim == "sparseadam":
        problem.share_moments(trainer.optimizer, torch.zeros(()))
    return trainer


def _ours(problem: _Problem, optim: str, weighting: str) -> Step:
    trainer, count, buffer = _trainer(problem, optim, weighting), 0, StepBuffer()

    def run() -> None:
        nonlocal count, buffer
        if count % 100 == 0:
            buffer = StepBuffer()
        trainer.step([problem.batches[count % _BATCHES]], buffer)
        count += 1

    return run


def _distance(weighting: str, sparse: bool, sizes: Mapping[str, int], device: torch.device) -> float:
    """Return how far the table's gradient is from autograd's of the weighted losses, relative to its norm."""
    problem = _Problem(_GATE_ROWS, sparse=sparse, device=device, huge=True, **sizes)
    trainer = _trainer(problem, "sgd", weighting, lr=0.0)
    inputs, labels = problem.batches[0]
    trainer.step([(inputs, labels)], StepBuffer())
    latest, got = trainer.step.latest, problem.table.weight.grad
    assert latest is not None
    assert latest.weights is not None
    assert got is not None
    losses, _ = trainer.step.problem.whole(inputs, labels)
    total = torch.stack(list(losses)) @ latest.weights.to(losses[0])
    (want,) = torch.autograd.grad(total, problem.table.weight)
    want = want.to_dense().double()
    return float((got.to_dense().double() - want).norm() / want.norm())


def run_sparse(
    rows: Sequence[int] = (1_000_000,),
    optims: Sequence[str] = OPTIMIZERS,
    strategies: Sequence[str] = STRATEGIES,
    *,
    dense: bool = False,
    tasks: int = 2,
    batch: int = 512,
    ids: int = 20,
    dim: int = 32,
    device: torch.device | str = "cpu",
    csv_path: Path | None = None,
    seconds: float = 10.0,
) -> list[Row]:
    """Time steps of a network with one table, and return one row per size, optimizer and contender.

    All run in turn: a plain loop that adds the losses up; the floor, which is one forward pass, T backward passes and
    the optimizer; ours, the trainer's whole step, whose table lies in huge pages; and a plain loop on such a table. EW
    is compared with the first plain loop, the others with the floor. A strategy whose gradient of a table of 50,000
    rows differs from autograd's by more than 1e-5 of its norm gets no time.

    Args:
        rows: Numbers of rows of the table.
        optims: ``"sgd"``, ``"sparseadam"``.
        strategies: Names of strategies with weights.
        dense: A table with dense gradients; SGD only.
        tasks: Number of tasks.
        batch: Bags of a batch.
        ids: Ids of a bag, drawn uniformly.
        dim: Width of the table.
        device: Where to run.
        csv_path: File to write the rows to.
        seconds: Time for each size and optimizer.

    Raises:
        UsageError: An unknown optimizer, or one that takes no gradients of this kind.
        BackendError: The device is not there.
    """
    device = find_device(device)
    for optim in optims:
        if optim not in OPTIMIZERS or (dense and optim != "sgd"):
            raise UsageError(f"optim must be {'sgd' if dense else ' or '.join(OPTIMIZERS)} here, got {optim!r}.")
    known = facts(device)
    print("  ".join(f"{key} {value}" for key, value in known.items()))
    sizes = {"dim": dim, "batch": batch, "ids": ids, "tasks": tasks}
    distances = {name: _distance(name, not dense, sizes, device) for name in strategies}
    found: list[Row] = []
    for count in rows:
        for optim in optims:
            small, huge = (
                _Problem(count, sparse=not dense, device=device, huge=is_huge, **sizes) for is_huge in (False, True)
            )
            for row in _timed(small, huge, optim, distances, seconds):
                row = {"rows": count, "optim": optim, "dense": dense, **row}
                print(_line(row), flush=True)
                found.append(row | sizes | known)
            if csv_path is not None:
                write_rows(found, csv_path)
    return found


def _timed(small: _Problem, huge: _Problem, optim: str, distances: Mapping[str, float], seconds: float) -> list[Row]:
    steps = {"plain loop": _loop(small, optim, False), "floor": _loop(small, optim, True)}
    steps |= {name: _ours(huge, optim, name) for name, distance in distances.items() if distance <= _ALLOWED}
    steps["plain loop, huge pages"] = _loop(huge, optim, False)
    tables = {name: (small if name in ("plain loop", "floor") else huge).table for name in steps}
    contenders = {
        name: LocalContender(run=step, shared=list(tables[name].parameters())) for name, step in steps.items()
    }
    peaks = {name: contender.peak_bytes() for name, contender in contenders.items()}
    samples = time_in_turn(contenders, small.device, seconds)
    rows: list[Row] = []
    for name in ("plain loop", "floor", "plain loop, huge pages", *distances):
        row: Row = {"contender": name}
        if name in distances:
            row["distance"] = distances[name]
        if name in samples:
            row |= spread(samples[name], "ms")
            row |= {"least_ms": min(samples[name]) * 1e3, "peak_mb": peaks[name] / 1e6}
            if name in distances:
                base = "plain loop" if name == "EW" else "floor"
                ratios = [own / other for own, other in zip(samples[name], samples[base], strict=True)]
                row |= {"beside": base, "ratio": statistics.median(ratios)}
                row["least_ratio"] = min(samples[name]) / min(samples[base])
        rows.append(row)
    if "EW" in samples:
        for row in rows:
            if row["contender"] in samples:
                row["times_ew"] = statistics.median(
                    own / other for own, other in zip(samples[row["contender"]], samples["EW"], strict=True)
                )
    return rows


def _line(row: Row) -> str:
    kind = "dense" if row["dense"] else "sparse"
    head = f"{row['rows']:>11,} rows  {kind} {row['optim']:10} {row['contender']:22}"
    if "median_ms" not in row:
        return f"{head} WRONG: {row['distance']:.0e} from autograd's gradient; not timed"
    text = f"{head} {row['median_ms']:7.2f} ms ({row['p20_ms']:.2f} .. {row['p80_ms']:.2f})  {row['peak_mb']:6.1f} MB"
    if "ratio" in row:
        text += f"  {row['ratio']:5.2f} (least times: {row['least_ratio']:.2f}) x {row['beside']}"
    return text + (f"  {row['times_ew']:5.2f} x EW" if "times_ew" in row else "")
