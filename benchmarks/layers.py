"""A step layer by layer: what each way costs beside the model that chooses among them, and how far sketches are off."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastmtl.benchmarks.machine import facts, wait_for
from fastmtl.benchmarks.step import task_trainer
from fastmtl.benchmarks.tables import write_rows
from fastmtl.benchmarks.work import Work
from torch import Tensor

from fastmtl import ops
from fastmtl.engine.context import Batch
from fastmtl.engine.layerwise.signs import Signs
from fastmtl.engine.layerwise.uses import Use, weight_uses
from fastmtl.engine.layerwise.ways import Compressed, Ghost, Sketched, Way, gradient_of, omega_of
from fastmtl.engine.pullback import weighted
from fastmtl.engine.trees import tensors_of
from fastmtl.engine.vjp import vjp
from fastmtl.engine.weights import Rows
from fastmtl.trainer.log.records import StepBuffer

__all__ = ["run_layers", "run_sketch"]

Row = dict[str, Any]
_REPEATS = 5


def run_layers(
    net: str, arch: str, count: int, batch: int, size: int | str, width: int, device: torch.device | str
) -> list[Row]:
    """Print and return, for each weight, the cost of each way over the direct one: by the model, and measured.

    Args:
        net: A network of `Work`.
        arch: The architecture.
        count: Tasks T.
        batch: Rows of the batch.
        size: Height and width of the images.
        width: Width of the sketches.
        device: Where to run.
    """
    device = torch.device(device)
    work = Work(net=net, arch=arch, count=count, batch=batch, size=size, device=device)
    trainer = _quiet(work, vjps="sketch", sketch_width=width)
    method = trainer.step.engine.method
    method.prepare(Batch(inputs=work.inputs, labels=work.labels, tasks=tuple(work.tasks)))
    features = tensors_of(trainer.model.trunk(work.inputs))
    uses = weight_uses(features, method.layers)
    edges = [use.edge for found in uses.values() for use in found]
    found = iter(vjp(features, [torch.randn_like(feature) for feature in features], edges, retain=True))
    names = {param: name for name, param in trainer.model.named_parameters()}
    signs = Signs(device, 0)
    rows = []
    print("  ".join(f"{key} {value}" for key, value in facts(device).items()))
    print("cost over the direct way's: by the model / measured")
    for weight, of_weight in uses.items():
        layer = method.layers[weight]
        one = [next(found) for _ in of_weight]
        cotangents = [[None if grad is None else grad.clone() for grad in one] for _ in range(count)]
        groups, _, fan_in = layer.omega
        (drawn,) = signs.draw([(groups, width - 1, fan_in)])
        total = torch.stack([use.total() for use in of_weight]).sum(0)
        omega = omega_of(total, drawn)
        makes: dict[str, Callable[[], Way]] = {
            "sketched": partial(Sketched, of_weight, omega),
            "compressed": partial(Compressed, of_weight),
            "ghost": partial(Ghost, of_weight),
        }
        seconds = {"direct": _seconds(partial(_direct, of_weight, cotangents), device)}
        for way in (way for way in layer.costs if way != "direct" and layer.costs[way] < 5 * layer.costs["direct"]):
            seconds[way] = _seconds(partial(_other, makes[way], of_weight, cotangents), device)
        row: Row = {
            "weight": names[weight],
            "shape": tuple(weight.shape),
            "chosen": method.plan.ways.get(weight, "direct"),
        }
        for way, of_way in seconds.items():
            row |= {f"{way}_model": layer.costs[way] / layer.costs["direct"], f"{way}_ms": 1e3 * of_way}
        rows.append(row)
        told = "  ".join(
            f"{way} {row[f'{way}_model']:.2f} / {of_way / seconds['direct']:.2f}"
            for way, of_way in seconds.items()
            if way != "direct"
        )
        print(f"{row['weight']:44} direct {row['direct_ms']:8.2f} ms  {told}  -> {row['chosen']}", flush=True)
    return rows


def _direct(uses: Sequence[Use], cotangents: Sequence[Sequence[Tensor | None]]) -> None:
    rows = [[gradient_of(uses, one)] for one in cotangents]
    ops.gram(rows)
    ops.combine(rows, torch.ones(len(rows), device=uses[0].weight.device))


def _other(make: Callable[[], Way], uses: Sequence[Use], cotangents: Rows) -> None:
    way = make()
    rows = [[way.piece(one)] for one in cotangents]
    if any(row[0] is not None for row in rows):
        ops.gram(rows)
    way.gram()
    gradient_of(uses, weighted(torch.ones(len(cotangents), device=uses[0].weight.device), cotangents))


@torch.no_grad()
def _seconds(call: Callable[[], None], device: torch.device) -> float:
    samples = []
    for _ in range(_REPEATS):
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        samples.append(time.perf_counter() - start)
    return min(samples)


def run_sketch(
    nets: Sequence[str],
    arch: str,
    tasks: Sequence[int],
    batches: Sequence[int],
    widths: Sequence[int],
    size: int | str,
    steps: int,
    device: torch.device | str,
    csv_path: Path | None = None,
) -> list[Row]:
    """Print and return the errors of sketched Gram matrices in the first steps of training on noise.

    The error is the largest difference of an entry over the product of the two gradients' norms.

    Args:
        nets: Networks of `Work`.
        arch: The architecture.
        tasks: Numbers of tasks T.
        batches: Rows of a batch.
        widths: Widths k.
        size: Height and width of the images.
        steps: Steps, each with new data and new signs; the first, whose plan sketches every layer, does not count.
        device: Where to run.
        csv_path: File to write the rows to.
    """
    known = facts(torch.device(device))
    print("  ".join(f"{key} {value}" for key, value in known.items()))
    rows: list[Row] = []
    for net in nets:
        for count in tasks:
            for batch in batches:
                work = Work(net=net, arch=arch, count=count, batch=batch, size=size, device=torch.device(device))
                for width in widths:
                    errors, sketched = _errors(work, width, steps)
                    row: Row = {
                        "net": net,
                        "arch": arch,
                        "tasks": count,
                        "batch": batch,
                        "width": width,
                        "median_error": statistics.median(errors),
                        "greatest_error": max(errors),
                        "sketched": sketched,
                    }
                    print(
                        f"{net:11} T={count:<3} batch {batch:<4} width {width:<4} error: median "
                        f"{100 * row['median_error']:.2f} %, greatest {100 * row['greatest_error']:.2f} %; "
                        f"{sketched} layers sketched",
                        flush=True,
                    )
                    rows.append(row | known)
                    if csv_path is not None:
                        write_rows(rows, csv_path)
    return rows


def _errors(work: Work, width: int, steps: int) -> tuple[list[float], int]:
    """Return the errors of steps on new noise, and how many layers are sketched in the last."""
    trainer = _quiet(work, vjps="sketch", sketch_width=width, gram_check_every=1)
    generator = torch.Generator().manual_seed(1)
    errors = []
    for _ in range(steps + 1):
        inputs = torch.randn(work.inputs.shape, generator=generator).to(work.device)
        labels = {task: torch.randint(0, 10, (work.batch,), generator=generator).to(work.device) for task in work.tasks}
        trainer.step([(inputs, labels)], StepBuffer(), None, True)
        errors.append(float(trainer.step.latest.gram_error))
    ways = trainer.step.engine.method.plan.ways
    return errors[1:], sum(way == "sketched" for way in ways.values())


def _quiet(work: Work, **way: Any) -> Any:
    """Return a trainer of the work by MGDA that has printed nothing."""
    with contextlib.redirect_stdout(io.StringIO()):
        return task_trainer(work, "MGDA", "fp32", **way)
