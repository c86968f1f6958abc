"""The cells of an experiment on data of one's own: what they share is kept in a file, each runs in its own process."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmtl.data import DataBundle
from fastmtl.errors import FastmtlError, UsageError
from fastmtl.experiments.grid import Method
from fastmtl.support.extras import need
from fastmtl.trainer import Trainer
from fastmtl.trainer.log.jsonl import JsonlLogger
from fastmtl.trainer.probe import GramProbe
from fastmtl.trainer.run.config import TrainConfig, read_config
from fastmtl.trainer.run.directory import RunDirectory, Tee, write_atomically
from fastmtl.trainer.setup.options import TrainerOptions
from fastmtl.utils import set_random_seed

__all__ = ["Problem", "Program", "load_problem", "reporting", "run_cell", "save_program"]


Decoders = nn.ModuleDict | Mapping[str, nn.Module]


@dataclass(kw_only=True)
class Problem:
    """Tasks, data and network of an experiment, as `Trainer` takes them.

    Attributes:
        task_dict: The tasks, see `Trainer`.
        train: Loader of (inputs, labels by task), or by task if ``multi_input``.
        test: The same, of test data.
        encoder_class: Called without arguments, returns the encoder.
        decoders: One module per task, or a function without arguments that returns them.
        val: The same as ``train``, of validation data; None for none.
        multi_input: Every task has its own inputs and its own loader.
        example_inputs: Inputs of a batch, where layers are lazy.
        name: What the data are called in the report.
    """

    task_dict: dict[str, dict[str, Any]]
    train: Any
    test: Any
    encoder_class: Callable[[], nn.Module]
    decoders: Decoders | Callable[[], Decoders]
    val: Any = None
    multi_input: bool = False
    example_inputs: Any = None
    name: str = "own data"


@dataclass(kw_only=True)
class Program:
    """What the cells of an experiment share.

    Attributes:
        make_data: Returns a `Problem` or a `DataBundle`, given the seed.
        methods: The methods by name.
    """

    make_data: Callable[[int], Problem | DataBundle]
    methods: dict[str, Method] = field(default_factory=dict)


def save_program(program: Program, path: Path) -> None:
    """Write a program to a file, functions and classes of the running script included.

    Raises:
        UsageError: A part of it cannot be sent to another process.
    """
    cloudpickle = need("cloudpickle", "experiments", "fastmtl.compare")
    try:
        content = cloudpickle.dumps(program)
    except Exception as cause:
        # Whatever make_data refers to raises what it likes.
        raise UsageError(
            f"make_data, an architecture or a strategy cannot be sent to another process: {cause} Make the data inside "
            f"make_data, or give jobs=0."
        ) from cause
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def load_problem(make_data: Callable[[int], Problem | DataBundle], seed: int) -> Problem:
    """Call ``make_data`` and return what it gives as a `Problem`.

    Raises:
        UsageError: It gives something else.
    """
    made = make_data(seed)
    if isinstance(made, DataBundle):
        return Problem(
            task_dict=made.task_dict,
            train=made.train,
            test=made.test,
            val=made.val,
            encoder_class=made.encoder_class,
            decoders=made.decoders,
            multi_input=made.multi_input,
            name=made.name,
        )
    if not isinstance(made, Problem):
        raise UsageError(
            f"make_data must return a fastmtl.experiments.Problem or a fastmtl.data.DataBundle, got a "
            f"{type(made).__name__}."
        )
    return made


def run_cell(path: Path, name: str, asked: Path, folder: Path, device: str, *, goes_on: bool) -> None:
    """Run a cell of the program in a file, or go on with it; write its folder as `fastmtl train` writes one.

    Args:
        path: The program.
        name: Name of the cell's method.
        asked: Its configuration.
        folder: Its run folder.
        device: The device; empty for the trainer's choice.
        goes_on: Whether the folder has a checkpoint to go on from.

    Raises:
        FastmtlError: The parts do not fit together, or training failed.
    """
    program: Program = need("cloudpickle", "experiments", "fastmtl.compare").loads(path.read_bytes())
    method, config = program.methods[name], read_config(asked)
    run = RunDirectory(folder) if goes_on else RunDirectory.create(folder)
    with Tee.recording(run.log):
        set_random_seed(config.seed)
        problem = load_problem(program.make_data, config.seed)
        trainer = _trainer(method, config, problem, run, device, goes_on=goes_on)
        write_atomically(run.config, _described(config, problem).as_yaml())
        trainer.train(
            problem.train, problem.test, config.epochs, val_dataloaders=problem.val if config.validate else None
        )


def _described(config: TrainConfig, problem: Problem) -> TrainConfig:
    return replace(config, dataset=problem.name, multi_input=problem.multi_input)


def _trainer(
    method: Method, config: TrainConfig, problem: Problem, run: RunDirectory, device: str, *, goes_on: bool
) -> Trainer:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    options = {entry.name: getattr(config, entry.name) for entry in fields(TrainerOptions)}
    if device:
        options["device"] = device
    made = problem.decoders
    decoders = made if isinstance(made, nn.ModuleDict | Mapping) else made()
    trainer = Trainer(
        problem.task_dict,
        method.weighting_class or method.weighting,
        method.arch_class or method.arch,
        problem.encoder_class,
        decoders,
        config.rep_grad,
        problem.multi_input,
        config.optim_param,
        config.scheduler_param,
        save_path=str(run.path),
        example_inputs=problem.example_inputs,
        logger=JsonlLogger(run.metrics),
        resume=str(run.last) if goes_on else None,
        weight_args=config.weight_args,
        arch_args=config.arch_args,
        **options,
    )
    if config.cosines:
        trainer.probe = GramProbe(trainer.step.problem)
    return trainer


def reporting(work: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """Call ``work`` and tell of an error as the `fastmtl` command does."""
    try:
        return work(words)
    except FastmtlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}", file=sys.stderr)
        return 1
