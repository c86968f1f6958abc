"""Predictions and labels brought to shapes that belong together; torch would broadcast what does not."""

from __future__ import annotations

from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.support.kinds import Tree

__all__ = ["as_classes", "as_classes_or_shares", "as_entries", "as_normals", "lined_up", "refuse_real", "same_but_ones"]


def as_entries(pred: Tree, gt: Tree, who: str) -> tuple[Tensor, Tensor]:
    """Return predictions and labels of the same shape: dimensions of 1 that only one of them has are left out.

    ``(batch, 1)`` goes with ``(batch,)``, ``(batch, 1, h, w)`` with ``(batch, h, w)``.

    Args:
        pred: Predictions.
        gt: Labels.
        who: The loss or metric, for the error.

    Raises:
        UsageError: They differ in more, or are no tensors.
    """
    _check_tensors(pred, gt, who)
    if pred.shape == gt.shape:
        return pred, gt
    if not same_but_ones(pred, gt):
        raise UsageError(
            f"{who}: predictions of shape {tuple(pred.shape)} do not go with labels of shape {tuple(gt.shape)}: the "
            "shapes must be the same, but for dimensions of 1 that only one of them has."
        )
    return (pred.reshape(gt.shape), gt) if pred.dim() > gt.dim() else (pred, gt.reshape(pred.shape))


def as_classes(pred: Tree, gt: Tree, who: str) -> tuple[Tensor, Tensor]:
    """Return logits ``(batch, classes, ...)`` and class labels ``(batch, ...)``, which may come as ``(batch, 1, ...)``.

    Args:
        pred: Logits of at least two classes.
        gt: Labels.
        who: The loss or metric, for the error.

    Raises:
        UsageError: The labels have another shape, there is one class only, or they are no tensors.
    """
    _check_tensors(pred, gt, who)
    if pred.dim() < 2 or pred.shape[1] < 2:
        raise UsageError(
            f"{who} takes logits (batch, classes, ...) of at least two classes, got shape {tuple(pred.shape)} for "
            f"labels of shape {tuple(gt.shape)}: one logit per label is for BCELoss and TorchMetric(BinaryAccuracy())."
        )
    wanted = pred.shape[:1] + pred.shape[2:]
    if gt.shape not in (wanted, (*wanted[:1], 1, *wanted[1:]), (*wanted, 1)):
        raise UsageError(
            f"{who}: predictions of shape {tuple(pred.shape)} do not go with labels of shape {tuple(gt.shape)}: class "
            f"labels of (batch, classes, ...) are (batch, ...), here {tuple(wanted)}."
        )
    return pred, gt.reshape(wanted)


def same_but_ones(pred: Tensor, gt: Tensor) -> bool:
    """Return whether two shapes are the same but for dimensions of 1, after the first, that only one of them has."""
    return pred.dim() != gt.dim() and _without_ones(pred) == _without_ones(gt)


def _without_ones(values: Tensor) -> list[int]:
    return [size for place, size in enumerate(values.shape) if place == 0 or size != 1]


def _check_tensors(pred: object, gt: object, who: str) -> None:
    for what, values in (("predictions", pred), ("labels", gt)):
        if not isinstance(values, Tensor):
            raise UsageError(f"{who} takes tensors, but the {what} are of type {type(values).__name__}.")


def as_classes_or_shares(pred: Tree, gt: Tree, who: str) -> tuple[Tensor, Tensor]:
    """Return logits and class labels as :func:`as_classes` does, or both as they are where labels are probabilities.

    Args:
        pred: Logits ``(batch, classes, ...)`` of at least two classes.
        gt: Integers, or in floating point probabilities of the shape of the logits.
        who: The loss, for the error.

    Raises:
        UsageError: The labels have another shape, there is one class only, or they are no tensors.
    """
    _check_tensors(pred, gt, who)
    if not gt.is_floating_point():
        if gt.dim() > 1 and gt.shape == pred.shape:
            raise UsageError(
                f"{who}: labels of shape {tuple(gt.shape)}, that of the predictions, are probabilities, but of "
                f"{gt.dtype}: make them floating point, as by labels.float(), or class indices, by labels.argmax(1)."
            )
        return as_classes(pred, gt, who)
    refuse_real(pred, gt, who, "probabilities")
    as_classes(pred, gt.select(1, 0) if gt.dim() > 1 else gt, who)
    return pred, gt


def refuse_real(pred: Tensor, gt: Tensor, who: str, what: str) -> None:
    """Refuse labels in floating point of another shape than the predictions, which would be no class indices."""
    if pred.shape != gt.shape:
        raise UsageError(
            f"{who}: labels of shape {tuple(gt.shape)} and {gt.dtype} are no class indices, which are integers, and no "
            f"{what}, which have the shape of the predictions, {tuple(pred.shape)}."
        )


def as_normals(pred: Tree, gt: Tree, who: str) -> None:
    """Check that predictions and labels are both ``(batch, 3, ...)``.

    Args:
        pred: Predictions.
        gt: Labels.
        who: The loss or metric, for the error.

    Raises:
        UsageError: They are not.
    """
    _check_tensors(pred, gt, who)
    if pred.shape != gt.shape or gt.dim() < 2 or gt.shape[1] != 3:
        raise UsageError(
            f"{who}: predictions and labels must both be (batch, 3, h, w), got shapes {tuple(pred.shape)} and "
            f"{tuple(gt.shape)}."
        )


def lined_up(known: Tensor, gt: Tensor) -> Tensor:
    """Return where labels are there with a 1 in place of each dimension that is left out, so that it broadcasts.

    Args:
        known: Booleans, ``(batch, ...)``: of the labels' shape, or without their channels, which are dimension 1 or the
            last one, or one for each row; 1 may stand for any dimension but the first.
        gt: Labels ``(batch, ...)``.

    Raises:
        UsageError: It is none of them, or could be both without dimension 1 and without the last one.
    """
    shape, size = tuple(gt.shape), tuple(known.shape)
    if known.dim() == gt.dim() and all(length in (1, full) for length, full in zip(size[1:], shape[1:], strict=True)):
        return known
    if gt.numel() == known.numel() and size[:1] == shape[:1]:
        return known.reshape(shape)
    first, last = size == shape[:1] + shape[2:], size == shape[:-1]
    if first and last and gt.dim() > 2:
        raise UsageError(
            f"labelled(gt) of the task's loss is of shape {size}, for labels of shape {shape}: it could be without "
            f"dimension 1 or without the last one. Keep the one that it leaves out as a 1, as {(*size, 1)}."
        )
    if first or last:
        return known.unsqueeze(1 if first else -1)
    if size[:1] == shape[:1] and known.numel() == len(known):
        return known.reshape(-1, *[1] * (gt.dim() - 1))
    raise UsageError(
        f"labelled(gt) of the task's loss is of shape {size}, which does not go with labels of shape {shape}: it must "
        "be of their shape, without their channels, dimension 1 or the last one, or have one entry for each row."
    )
