"""Evaluation on a data split."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fastmtl.engine.losses import LabelError
from fastmtl.trainer.faults import check_labels, of_data_set
from fastmtl.trainer.optim.optimizer import set_mode
from fastmtl.trainer.setup.loaders import eval_batches
from fastmtl.trainer.state import TrainerState

__all__ = ["evaluate", "report"]


@torch.no_grad()
def evaluate(trainer: TrainerState, loaders: Any, mode: str, epoch: int | None) -> None:
    """Run the network on all batches, and print and log losses and scores.

    Args:
        trainer: The trainer.
        loaders: The data.
        mode: ``"val"`` or ``"test"``.
        epoch: The current epoch, if within training.
    """
    trainer.model.eval()
    set_mode(trainer.optimizer, training=False)
    trainer.step.comm.unshard()
    # Batch statistics are each process's own; what is saved is the main one's.
    trainer.peers.broadcast(trainer.common_buffers())
    meter, problem = trainer.meter, trainer.step.problem
    meter.begin()
    names, multi_input = trainer.task_name, trainer.multi_input
    checked: set[str | None] = set()
    for task, *batch in eval_batches(loaders, names, multi_input, trainer.limit_batches, what=f"{mode}_dataloaders"):
        inputs, labels = trainer.prepared((batch[0], batch[1]))
        try:
            if task not in checked:
                checked.add(task)
                check_labels(meter.losses, batch[1] if task is None else {task: batch[1]})
            if task is None:
                losses, preds = problem.without_graph(partial(problem.whole, inputs, labels))
                present = filter(labels.__contains__, names)
                meter.update(dict(zip(present, losses, strict=True)), preds, labels, batch[1])
            else:
                loss, pred = problem.without_graph(partial(problem.single, inputs, labels, task))
                meter.update({task: loss}, {task: pred}, {task: labels}, {task: batch[1]})
        except LabelError as error:
            raise of_data_set(error, meter.losses, loaders) from error
    meter.end()
    report(trainer, mode, epoch)


def report(trainer: TrainerState, mode: str, epoch: int | None) -> None:
    """Print and log the scores of the pass that the meter has just ended."""
    meter = trainer.meter
    meter.display(mode, epoch)
    losses = dict(zip(trainer.task_name, map(float, meter.loss_item), strict=True))
    trainer.logger.on_epoch(epoch or 0, mode, losses, meter.results, meter.seconds)
