"""Shapes of predictions and labels, checked and matched: torch would broadcast what does not match.

``who`` is the name of the loss or metric, for error messages; mismatches raise a ``UsageError``.
"""

from __future__ import annotations

from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.support.kinds import Tree

__all__ = [
    "as_classes",
    "as_classes_or_shares",
    "as_entries",
    "check_normals",
    "lined_up",
    "refuse_real",
    "same_but_ones",
    "without_extra_ones",
]


def as_entries(pred: Tree, gt: Tree, who: str) -> tuple[Tensor, Tensor]:
    """Return predictions and labels of the same shape, without dimensions of 1 that only one of them has.

    ``(batch, 1)`` matches ``(batch,)``, ``(batch, 1, h, w)`` matches ``(batch, h, w)``.
    """
    _check_tensors(pred, gt, who)
    pred, gt = without_extra_ones(pred, gt)
    if pred.shape != gt.shape:
        raise UsageError(
            f"{who}: predictions of shape {tuple(pred.shape)} do not match labels of shape {tuple(gt.shape)}: the "
            "shapes must be equal, but for dimensions of 1 that only one of them has."
        )
    return pred, gt


def as_classes(pred: Tree, gt: Tree, who: str) -> tuple[Tensor, Tensor]:
    """Return logits ``(batch, classes, ...)`` of at least two classes and class indices ``(batch, ...)``.

    Class indices may also be given as ``(batch, 1, ...)`` or ``(batch, ..., 1)``.
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
            f"{who}: predictions of shape {tuple(pred.shape)} do not match labels of shape {tuple(gt.shape)}: for "
            f"logits (batch, classes, ...) class labels must be (batch, ...), here {tuple(wanted)}."
        )
    return pred, gt.reshape(wanted)


def same_but_ones(pred: Tensor, gt: Tensor) -> bool:
    """Return whether two shapes differ by dimensions of 1, after the first, that only one of them has."""
    return pred.dim() != gt.dim() and _without_ones(pred) == _without_ones(gt)


def without_extra_ones(pred: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    """Return predictions and labels in one shape if they are :func:`same_but_ones`, otherwise as they are."""
    if not same_but_ones(pred, gt):
        return pred, gt
    return (pred.reshape(gt.shape), gt) if pred.dim() > gt.dim() else (pred, gt.reshape(pred.shape))


def _without_ones(values: Tensor) -> list[int]:
    return [size for place, size in enumerate(values.shape) if place == 0 or size != 1]


def _check_tensors(pred: object, gt: object, who: str) -> None:
    for what, values in (("predictions", pred), ("labels", gt)):
        if not isinstance(values, Tensor):
            raise UsageError(f"{who} takes tensors, but the {what} are of type {type(values).__name__}.")


def as_classes_or_shares(pred: Tree, gt: Tree, who: str) -> tuple[Tensor, Tensor]:
    """Return logits and class indices as :func:`as_classes` does, or logits and probabilities of their shape."""
    if isinstance(pred, Tensor) and isinstance(gt, Tensor) and pred.dim() == 2 and gt.dim() == 1:
        rows, classes = pred.shape
        if classes > 1 and gt.shape[0] == rows and not gt.is_floating_point():
            return pred, gt
    _check_tensors(pred, gt, who)
    if not gt.is_floating_point():
        if gt.dim() > 1 and gt.shape == pred.shape:
            raise UsageError(
                f"{who}: labels of shape {tuple(gt.shape)}, the shape of the predictions, are probabilities, but their "
                f"dtype is {gt.dtype}: pass labels.float(), or class indices, as by labels.argmax(1)."
            )
        return as_classes(pred, gt, who)
    refuse_real(pred, gt, who, "probabilities")
    as_classes(pred, gt.select(1, 0) if gt.dim() > 1 else gt, who)
    return pred, gt


def refuse_real(pred: Tensor, gt: Tensor, who: str, what: str) -> None:
    """Refuse floating-point labels of another shape than the predictions, which are neither indices nor ``what``."""
    if pred.shape != gt.shape:
        raise UsageError(
            f"{who}: labels of shape {tuple(gt.shape)} and {gt.dtype} are neither class indices, which are integers, "
            f"nor {what}, which have the shape of the predictions, {tuple(pred.shape)}."
        )


def check_normals(pred: Tree, gt: Tree, who: str) -> None:
    """Check that predictions and labels are both ``(batch, 3, ...)``."""
    _check_tensors(pred, gt, who)
    if pred.shape != gt.shape or gt.dim() < 2 or gt.shape[1] != 3:
        raise UsageError(
            f"{who}: predictions and labels must both be (batch, 3, h, w), got shapes {tuple(pred.shape)} and "
            f"{tuple(gt.shape)}."
        )


def lined_up(known: Tensor, gt: Tensor) -> Tensor:
    """Return ``known`` with a 1 for each dimension of the labels ``(batch, ...)`` that it lacks, so that it broadcasts.

    ``known`` are booleans that say where labels are present: of the labels' shape, without their channels, which are
    dimension 1 or the last one, or ``(batch,)``; a 1 may stand for any dimension but the first.
    """
    shape, size = tuple(gt.shape), tuple(known.shape)
    if known.dim() == gt.dim() and all(length in (1, full) for length, full in zip(size[1:], shape[1:], strict=True)):
        return known
    if gt.numel() == known.numel() and size[:1] == shape[:1]:
        return known.reshape(shape)
    first, last = size == shape[:1] + shape[2:], size == shape[:-1]
    if first and last and gt.dim() > 2:
        raise UsageError(
            f"labelled(gt) of the task's loss has shape {size} for labels of shape {shape}: either dimension 1 or the "
            f"last one could be missing. Keep the missing dimension as a 1, such as {(*size, 1)}."
        )
    if first or last:
        return known.unsqueeze(1 if first else -1)
    if size[:1] == shape[:1] and known.numel() == len(known):
        return known.reshape(-1, *[1] * (gt.dim() - 1))
    raise UsageError(
        f"labelled(gt) of the task's loss has shape {size}, which does not match labels of shape {shape}: it must have "
        "their shape, with or without the channels (dimension 1 or the last one), or one entry per row."
    )
