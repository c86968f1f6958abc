"""What is wrong with a batch, in one sentence that names the task, and the user's file and line where it is theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fastmtl.engine.losses import LabelError
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss, BCELoss, FocalLoss
from fastmtl.support.named import line_in_own_code, own_place
from fastmtl.trainer.setup.loaders import place_of_data
from fastmtl.trainer.setup.losses import EntryLoss
from fastmtl.trainer.state import TrainerState

__all__ = ["check_labels", "of_data_set", "unfit_inputs"]


def check_labels(losses: Mapping[str, AbsLoss], labels: Mapping[str, Any]) -> None:
    """Refuse binary labels below 0 or above 1, of which a cross-entropy would have no least value.

    Args:
        losses: The loss of each task.
        labels: The labels of a batch by task, in the host's memory; on a device, reading them waits.

    Raises:
        LabelError: A label is neither missing nor from 0 to 1.
    """
    for task, loss in losses.items():
        gt = labels.get(task)
        if not isinstance(gt, Tensor) or not gt.numel() or gt.dtype == torch.bool or not _is_binary(loss, gt):
            continue
        known = gt[loss.labelled(gt)]
        wrong = known[(known < 0) | (known > 1)]
        if wrong.numel():
            raise LabelError(
                f"Task {task}: binary labels must be 0 or 1, or between them, got {wrong[0].item():g}; a missing one "
                f"is {'NaN' if gt.is_floating_point() else loss.ignore_index}.",
                task,
            )


def _is_binary(loss: AbsLoss, gt: Tensor) -> bool:
    """Return whether a loss is the cross-entropy of binary labels, as it is in the package or in torch."""
    if isinstance(loss, BCELoss):
        return type(loss).compute_loss is BCELoss.compute_loss and type(loss).labelled is AbsLoss.labelled
    if isinstance(loss, FocalLoss):
        # Its integers may be those of several classes.
        return type(loss) is FocalLoss and gt.is_floating_point()
    if not isinstance(loss, EntryLoss):
        return False
    inner = loss.inner
    return type(inner) is nn.BCEWithLogitsLoss or getattr(inner, "func", inner) is binary_cross_entropy_with_logits


def of_data_set(error: LabelError, losses: Mapping[str, AbsLoss], loaders: Any) -> LabelError:
    """Return the error with the place of the user's data set, unless the loss is the user's as well."""
    if own_place(type(losses[error.task])):
        return error
    loader = loaders.get(error.task) if isinstance(loaders, Mapping) else loaders
    return LabelError(f"{place_of_data(loader)}{error}", error.task)


def unfit_inputs(trainer: TrainerState, inputs: Any, loaders: Any, cause: Exception) -> UsageError | None:
    """Return the error for inputs that the encoder cannot read; None if it can, so that something else failed.

    A new encoder tries them, which costs nothing as long as nothing fails.

    Args:
        trainer: The trainer.
        inputs: Those of a batch, on the device, by task if multi-input.
        loaders: Where they are from.
        cause: What was raised.
    """
    if isinstance(cause, torch.OutOfMemoryError):
        return None
    of_task = next(iter(inputs)) if trainer.multi_input else None
    tried = inputs if of_task is None else inputs[of_task]
    make: Callable[[], nn.Module] = trainer.model.encoder_class
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    low = trainer.step.problem.low_precision
    try:
        with torch.random.fork_rng(devices):
            encoder = make().to(trainer.device)
    except Exception:
        # Made more than once it may fail for reasons of its own; what was raised before says more.
        return None
    with torch.no_grad(), torch.random.fork_rng(devices):
        try:
            with nullcontext() if low is None else torch.autocast(trainer.device.type, low):
                encoder(tried)
        except Exception as error:
            loader = loaders if of_task is None else loaders[of_task]
            place = line_in_own_code(error)
            own = f"{place}: " if place else own_place(type(encoder)) or own_place(make)
            name = f"{type(encoder).__name__} of {own.removesuffix(': ')}" if own else type(encoder).__name__
            said = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
            return UsageError(
                f"{place_of_data(loader)}The inputs of the data set, {_form(tried)}, do not fit the encoder, {name}: "
                f"{said}."
            )
    return None


def _form(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')} of shape {tuple(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return f"a dictionary of {', '.join(map(str, inputs))}"
    return f"of type {type(inputs).__name__}"
