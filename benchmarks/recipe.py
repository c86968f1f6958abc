"""The training step of a recipe: its own network, optimizer and first batch, beside the same in plain torch."""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastmtl.benchmarks.apart import Apart
from fastmtl.benchmarks.contender import Contender, LocalContender
from fastmtl.benchmarks.machine import facts
from fastmtl.benchmarks.peers.clock import ScriptSteps
from fastmtl.benchmarks.peers.scripts import Setting, find_scripts
from fastmtl.benchmarks.runner import spread, time_in_turn
from fastmtl.benchmarks.tables import write_rows
from torch import Tensor

from fastmtl import Trainer
from fastmtl.engine.labels import are_complete, present_tasks
from fastmtl.recipes import find_recipe
from fastmtl.support.names import resolve_name
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.run.config import TrainConfig, config_of
from fastmtl.trainer.setup.checks import find_device
from fastmtl.utils import set_random_seed
from fastmtl.weighting import WEIGHTINGS

__all__ = ["SHAPES", "run_recipe_step"]

# Recipes whose network the peers have too: the network, numbers of tasks and batch that `run_step` is given for them.
SHAPES: dict[str, tuple[str, list[int], int]] = {"qm9": ("nnconv", [11], 120)}

_LOG_EVERY = 50

Row = dict[str, Any]
Batch = tuple[Any, dict[str, Any]]


def run_recipe_step(
    recipe: str,
    weightings: Sequence[str],
    *,
    scripts: Sequence[Path] = (),
    scale: str | None = None,
    batch: int | None = None,
    dataset_path: str | None = None,
    device: torch.device | str = "cpu",
    csv_path: Path | None = None,
    seconds: float = 20.0,
) -> list[Row]:
    """Time the recipe's training step beside its floor and the sum of the losses, all in turn; print and return rows.

    The floor is the forward pass, as many backward passes as our step has, and the optimizer; ``sum`` has one backward
    pass. Both run the recipe's network in plain torch. The scripts of the recipe's authors, or of those who made it a
    benchmark, run with their own network, losses and first weights, on batches of as many rows of the same data: what
    they compute is not compared with ours, only how long a step takes.

    Args:
        recipe: Its name, or a YAML file.
        weightings: Strategies, in any case.
        scripts: Folders with checkouts of projects that have a script for the recipe.
        scale: Reduction of the recipe.
        batch: Rows of a batch, in place of the recipe's.
        dataset_path: Folder of the data set, where it is not in the package.
        device: Where to run.
        csv_path: File to write the rows to.
        seconds: Time for each strategy.

    Raises:
        UsageError: An unknown name, or data that are not there.
        BackendError: The device is not there.
    """
    found, device = find_recipe(recipe), find_device(device)
    known, beside = facts(device), find_scripts(found.name, scripts)
    print("  ".join(f"{key} {value}" for key, value in known.items()))
    rows: list[Row] = []
    for asked in weightings:
        name = resolve_name(asked, {each: each for each in WEIGHTINGS}, "weighting")
        settings = {"weighting": name, "device": str(device), "dataset_path": dataset_path, "batch_size": batch}
        given = {key: value for key, value in settings.items() if value is not None}
        config = config_of({**found.at(scale), **given}, found.file)
        start, rows_of_batch = _starts(config)
        contenders: dict[str, Contender] = {
            "fastmtl": _ours(*start()),
            "floor": _plain(*start(), together=WEIGHTINGS[name].needs == "losses"),
            "sum": _plain(*start(), together=True),
        }
        setting = Setting(strategy=name, batch=rows_of_batch, data=dataset_path)
        for checkout, script in beside:
            if script.has(name, checkout):
                label = f"{script.project}'s script"
                build = partial(ScriptSteps, found.name, checkout, setting, device)
                contenders[label] = Apart(label, build)
                print(f"{label}: {script.differs}" if script.differs else f"{label}: {script.file}")
        samples = time_in_turn(contenders, device, seconds)
        for library, times in samples.items():
            row: Row = {"recipe": found.name, "strategy": name, "library": library}
            row |= spread(times, "ms")
            pairs = [one / two for one, two in zip(times, samples["floor"], strict=True)]
            row["times_floor"] = statistics.median(pairs)
            pairs = [one / two for one, two in zip(times, samples["fastmtl"], strict=True)]
            row["times_fastmtl"] = statistics.median(pairs)
            print(
                f"{name:11} {library:16} {row['median_ms']:9.2f} ms  "
                f"({row['p20_ms']:.2f} .. {row['p80_ms']:.2f})  {row['times_floor']:6.3f} x floor  "
                f"{row['times_fastmtl']:6.3f} x fastmtl",
                flush=True,
            )
            rows.append(row | known)
        if csv_path is not None:
            write_rows(rows, csv_path)
    return rows


def _starts(config: TrainConfig) -> tuple[Callable[[], tuple[Trainer, Batch]], int]:
    """Return a function that returns a trainer in the middle of training and its first batch, and the batch's rows.

    The trainer is always the same.
    """
    from fastmtl.cli.build import build_trainer, load_data

    complete, bundle = load_data(config)
    if isinstance(bundle.train, dict):
        of_task = {task: next(iter(loader)) for task, loader in bundle.train.items()}
        batch: Any = tuple({task: pair[part] for task, pair in of_task.items()} for part in (0, 1))
    else:
        batch = next(iter(bundle.train))

    def start() -> tuple[Trainer, Batch]:
        set_random_seed(complete.seed)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = build_trainer(complete, bundle)
        trainer.model.epoch, trainer.model.epochs = 0, 1
        trainer.model.train()
        trainer.meter.begin()
        return trainer, trainer.prepared(batch)

    assert complete.batch_size is not None
    return start, complete.batch_size


def _ours(trainer: Trainer, batch: Batch) -> LocalContender:
    """Return the step as the trainer runs it, metrics and log included."""
    buffer, batches = StepBuffer(), [batch] * trainer.step.batches

    def step() -> None:
        complete = are_complete(trainer.meter.losses, batch[1])
        present = None if complete else present_tasks(trainer.meter.losses, [batch[1]])
        losses, preds = trainer.step(batches, buffer, present, complete)
        trainer.meter.update(losses, preds[-1], batch[1])
        if len(buffer) == _LOG_EVERY:
            buffer.flush(0, _LOG_EVERY)

    while not trainer.step.trial.settled:
        step()
    return LocalContender(run=step, shared=trainer.step.problem.shared_params)


def _plain(trainer: Trainer, batch: Batch, *, together: bool) -> LocalContender:
    """Return forward pass, backward passes and the trainer's optimizer: one backward pass if ``together``."""
    problem, optimizer = trainer.step.problem, trainer.optimizer
    some, trained = trainer.step.sampler.per_step or trainer.task_num, problem.trained()

    def forward() -> list[Tensor]:
        inputs, labels = batch
        if trainer.multi_input:
            return [problem.single(inputs[task], labels[task], task)[0] for task in problem.tasks]
        return list(problem.whole(inputs, labels)[0])

    def step() -> None:
        optimizer.zero_grad()
        losses = forward()[:some]
        if together:
            torch.stack(losses).sum().backward()
        else:
            for index, loss in enumerate(losses):
                last = index + 1 == len(losses)
                grads = torch.autograd.grad(loss, trained, retain_graph=not last, allow_unused=True)
                # The optimizer moves all parameters, the shared ones by one task's gradient.
                for param, grad in zip(trained, grads, strict=True):
                    param.grad = param.grad if grad is None else grad
        optimizer.step()

    return LocalContender(run=step, shared=problem.shared_params)
