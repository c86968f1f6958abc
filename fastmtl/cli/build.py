"""From a configuration to a trainer and its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastmtl import data
from fastmtl.architecture import find_architecture
from fastmtl.data import DataBundle
from fastmtl.errors import UsageError
from fastmtl.trainer import Trainer
from fastmtl.trainer.checkpoint.files import rng_state, set_rng_state
from fastmtl.trainer.log.logger import Logger
from fastmtl.trainer.probe import GramProbe
from fastmtl.trainer.run.config import TrainConfig, names_in
from fastmtl.trainer.setup.loaders import generators
from fastmtl.trainer.setup.options import TrainerOptions
from fastmtl.utils import set_random_seed

__all__ = ["build_trainer", "first_inputs", "load_data", "whole_path"]


def load_data(config: TrainConfig) -> tuple[TrainConfig, DataBundle]:
    """Seed the random numbers, load the data set and return it with the configuration it completes.

    Raises:
        UsageError: No such data set, folder or encoder, or a data set of the other kind than `multi_input` says.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    set_random_seed(config.seed)
    bundle = data.load(
        config.dataset,
        batch_size=config.batch_size,
        test_batch_size=config.test_batch_size,
        seed=config.seed,
        path=config.dataset_path,
        n_train=config.train_size,
        augment=config.aug,
        encoder=config.encoder,
        encoder_args=config.encoder_args,
        pretrained=config.pretrained,
        stages=find_architecture(config.arch).value.needs_stages,
        loss=config.loss,
        metric=config.metric,
        inputs=tuple(names_in(config.inputs)),
        tasks=config.tasks,
        negatives=config.negatives,
        stream=config.stream,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
    )
    if config.multi_input not in (None, bundle.multi_input):
        inputs = "inputs for each task" if bundle.multi_input else "inputs that the tasks share"
        raise UsageError(f"multi_input is {config.multi_input}, but the data set {bundle.name} has {inputs}.")
    complete = replace(
        config,
        dataset=data.find_dataset(config.dataset).name,
        # Not before, so that what is wrong with the folder is told with the path as it was given.
        dataset_path=None if config.dataset_path is None else whole_path(config.dataset_path),
        encoder=bundle.encoder,
        batch_size=bundle.batch_size,
        test_batch_size=bundle.test_batch_size,
        multi_input=bundle.multi_input,
        train_size=bundle.rows["train"],
    )
    return complete, bundle


def whole_path(path: str) -> str:
    """Return the absolute path of a folder, which means the same from any other."""
    return str(Path(path).expanduser().resolve())


def build_trainer(
    config: TrainConfig,
    bundle: DataBundle,
    *,
    save_path: Path | None = None,
    profile: Path | None = None,
    resume: Path | None = None,
    logger: list[Logger] | Logger | None = None,
) -> Trainer:
    """Return the trainer of a complete configuration (as `load_data` gives it).

    Raises:
        UsageError: The parts do not fit together.
        BackendError: The device is not there.
        CheckpointError: The checkpoint is missing or of another model.
    """
    options = {field.name: getattr(config, field.name) for field in fields(TrainerOptions)}
    # The state of a run to go on with holds the parameters too.
    load_path = None if resume is not None else config.load_path
    trainer = Trainer(
        task_dict=bundle.task_dict,
        weighting=config.weighting,
        architecture=config.arch,
        encoder_class=bundle.encoder_class,
        decoders=bundle.decoders(),
        rep_grad=config.rep_grad,
        multi_input=bundle.multi_input,
        optim_param=config.optim_param,
        scheduler_param=config.scheduler_param,
        load_path=load_path,
        save_path=None if save_path is None else str(save_path),
        example_inputs=partial(first_inputs, bundle),
        logger=logger,
        profile=profile,
        resume=None if resume is None else str(resume),
        weight_args=config.weight_args,
        arch_args=config.arch_args,
        **options,
    )
    if config.cosines:
        _look_at_cosines(trainer)
    return trainer


def _look_at_cosines(trainer: Trainer) -> None:
    """Let a trainer log cosines of the task gradients, whatever its strategy needs.

    Raises:
        UsageError: It is one of several processes, which have parts of a batch each.
    """
    if trainer.peers.size > 1:
        raise UsageError("cosines is for a single process: start one.")
    trainer.probe = GramProbe(trainer.step.problem)


def first_inputs(bundle: DataBundle) -> Any:
    """Return the inputs of a training batch; the random numbers that order the rows are the same afterwards."""
    drawn_by = generators(bundle.train, bundle.multi_input)
    before = rng_state(drawn_by)
    try:
        if isinstance(bundle.train, Mapping):
            return {task: next(iter(loader))[0] for task, loader in bundle.train.items()}
        return next(iter(bundle.train))[0]
    finally:
        set_rng_state(before, drawn_by)
