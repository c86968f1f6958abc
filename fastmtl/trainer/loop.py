"""The loop over the epochs of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastmtl.errors import UsageError
from fastmtl.support.hyper import check_value, declared
from fastmtl.trainer.checkpoint.data import TrainingData
from fastmtl.trainer.checkpoint.files import set_rng_state
from fastmtl.trainer.checkpoint.resume import BEGINNING
from fastmtl.trainer.checkpoint.writer import Checkpoints
from fastmtl.trainer.epoch import TrainingEpoch
from fastmtl.trainer.evaluation import evaluate
from fastmtl.trainer.log.logger import RunInfo
from fastmtl.trainer.optim.schedule import Place
from fastmtl.trainer.run.config import TrainConfig
from fastmtl.trainer.run.interrupt import DeferredInterrupt
from fastmtl.trainer.setup.loaders import check_loaders, count_batches
from fastmtl.trainer.state import TrainerState

__all__ = ["run_epochs"]


def run_epochs(
    trainer: TrainerState,
    checkpoints: Checkpoints,
    train_dataloaders: Any,
    test_dataloaders: Any,
    epochs: int,
    val_dataloaders: Any,
) -> None:
    """Train and evaluate epoch by epoch; the arguments are those of :meth:`Trainer.train`."""
    check_value("epochs", epochs, declared(TrainConfig)["epochs"])
    batches = _checked_batches(trainer, train_dataloaders, test_dataloaders, val_dataloaders)
    data = TrainingData(train_dataloaders, trainer.task_name, trainer.multi_input, trainer.peers)
    data.check(trainer.start)
    trainer.meter.has_val = val_dataloaders is not None
    steps = -(-batches // trainer.step.options.accumulate)
    trainer.batch_weight = np.zeros((trainer.task_num, epochs, steps))
    trainer.model.train_loss_buffer = np.zeros((trainer.task_num, epochs))
    info = _run_info(trainer, epochs, steps)
    if not info.start_step:
        trainer.stopping.begin()
    if trainer.stopping.is_over:
        print(f"Nothing is left to train: the run was stopped early, after {info.start_epoch} epochs.")
    elif epochs <= info.start_epoch:
        print(f"Nothing is left to train: {info.start_epoch} of {epochs} epochs are done; raise epochs to go on.")
    else:
        trainer.schedule.begin(Place(epochs, steps, info.start_epoch, info.start_batch))
    # Where a checkpoint left off; a further call begins anew, from the parameters of now.
    start, trainer.start = trainer.start, BEGINNING
    checkpoints.data = data
    if "rng" in start:
        set_rng_state(start["rng"], data.generators)
    known = np.array(start["train_losses"]).reshape(trainer.task_num, -1)[:, :epochs]
    trainer.model.train_loss_buffer[:, : known.shape[1]] = known
    trainer.model.epochs = epochs
    try:
        trainer.logger.on_start(info)
        with DeferredInterrupt(tells=trainer.peers.is_main_process) as interrupt:
            for epoch in range(start["epoch"], epochs):
                if trainer.stopping.is_over:
                    break
                if start["batch"] < steps:
                    TrainingEpoch(trainer, checkpoints, data, epoch, steps, interrupt).run(start)
                start = BEGINNING
                _evaluate_epoch(trainer, checkpoints, val_dataloaders, test_dataloaders, epoch)
                interrupt.check()
        _tell_stopped(trainer)
    finally:
        if trainer.profiler is not None:
            trainer.profiler.stop()
        trainer.logger.on_end(trainer.meter.best_result["epoch"], trainer.meter.best_result["result"] or {})
    trainer.meter.display_best_result()
    if trainer.stopping.is_asked_for:
        print(trainer.stopping.describe())


def _checked_batches(trainer: TrainerState, train: Any, test: Any, val: Any) -> int:
    """Check the loaders and what has become of the trainer; return how many batches an epoch has."""
    if trainer.optimizer is not trainer.step.optimizer.optimizer:
        raise UsageError(
            "The trainer's optimizer cannot be replaced: give Trainer optimizer, a function that returns it."
        )
    named = {"train_dataloaders": train, "test_dataloaders": test}
    for what, loaders in (named if val is None else named | {"val_dataloaders": val}).items():
        check_loaders(loaders, trainer.task_name, trainer.multi_input, what)
    batches = count_batches(train, trainer.multi_input, trainer.limit_batches)
    if len(counts := set(trainer.peers.all_gather_object(batches))) > 1:
        raise UsageError(f"train_dataloaders must have the same length in all processes, got {sorted(counts)}.")
    return batches


def _evaluate_epoch(trainer: TrainerState, checkpoints: Checkpoints, val: Any, test: Any, epoch: int) -> None:
    if val is not None:
        evaluate(trainer, val, "val", epoch)
    evaluate(trainer, test, "test", epoch)
    trainer.schedule.after_epoch(0.0 if trainer.meter.improvement is None else trainer.meter.improvement)
    trainer.stopping.after_epoch(epoch, trainer.meter)
    checkpoints.save_best(epoch)
    checkpoints.save_last(epoch + 1, 0)


def _tell_stopped(trainer: TrainerState) -> None:
    """Tell of a run that was stopped early, and keep no weights of epochs that it does not have."""
    stopping = trainer.stopping
    if stopping.last is None:
        return
    print(f"Stopped early: epoch {stopping.last} was the last one")
    trainer.batch_weight = trainer.batch_weight[:, : stopping.last + 1]
    trainer.logger.on_stop(stopping.last, {task: best["epoch"] for task, best in stopping.best.items()})


def _run_info(trainer: TrainerState, epochs: int, steps: int) -> RunInfo:
    return RunInfo(
        task_names=trainer.task_name,
        metric_names={task: list(trainer.task_dict[task]["metrics"]) for task in trainer.task_name},
        epochs=epochs,
        batches_per_epoch=steps,
        weighting=trainer.weighting,
        architecture=trainer.architecture,
        device=str(trainer.device),
        start_epoch=trainer.start["epoch"],
        start_batch=trainer.start["batch"],
        save_path=trainer.save_path,
        metric_weights={task: list(trainer.task_dict[task]["weight"]) for task in trainer.task_name},
        group_names=[] if trainer.model.grouping is None else trainer.model.grouping.names,
    )
