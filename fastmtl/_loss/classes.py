"""Losses of class labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl._loss.base import AbsLoss, PerClass, differs, is_complete, mean_known, over
from fastmtl.errors import UsageError
from fastmtl.support.shapes import as_classes, as_classes_or_shares, as_entries, lined_up, refuse_real, same_but_ones

__all__ = ["CELoss", "FocalLoss", "SegLoss"]


class CELoss(AbsLoss):
    """Cross-entropy of logits ``(batch, classes, ...)`` and labels, averaged over the labelled entries.

    Labels are class indices ``(batch, ...)`` or ``(batch, 1, ...)``, or probabilities ``(batch, classes, ...)``.
    The loss of an entry is ``-log softmax(pred)_gt``.
    With class weights the mean is ``sum_i w_gt_i l_i / sum_i w_gt_i`` for class indices, as in torch; for
    probabilities the weights multiply the terms of the classes, and the mean is over entries.

    Args:
        ignore_index: The class index that marks a missing label.
        weight: ``(classes,)`` weight of each class, numbers or a tensor; all 1 if None.
        label_smoothing: Share, from 0 to 1, of each label that is spread evenly over all classes.

    Raises:
        UsageError: The weights or the smoothing are out of range; with predictions and labels, shapes do not match.
    """

    ignore_index: int
    marks_entries = True

    def __init__(
        self, ignore_index: int = -100, *, weight: Sequence[float] | Tensor | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise UsageError(f"label_smoothing must be from 0 to 1, got {label_smoothing!r}.")
        self.ignore_index = ignore_index
        self.weight = None if weight is None else PerClass(weight, "weight")
        self.label_smoothing = label_smoothing

    @property
    def _is_plain(self) -> bool:
        """Whether the loss is torch's mean, which a subclass may have changed."""
        unchanged = self.marks_entries and type(self).divisor is CELoss.divisor
        return unchanged and self.weight is None and not self.label_smoothing

    def labelled(self, gt: Tensor) -> Tensor:
        """Return which entries are labelled, ``(batch, ...)``."""
        known = super().labelled(gt)
        return known.all(1) if gt.is_floating_point() and gt.dim() > 1 else known

    def divisor(self, gt: Tensor) -> Tensor:
        """Return the number of labelled entries, or the sum of the weights of their classes."""
        known = self.labelled(gt)
        if self.weight is None or gt.is_floating_point():
            return known.sum()
        weights = self.weight.on(gt.device)
        classes = torch.where(known, gt, 0).clamp(0, len(weights) - 1).flatten().long()
        return torch.where(known.flatten(), weights.index_select(0, classes), 0).sum()

    def divisors(self, gt: Tensor, count: int) -> Tensor:
        """Return the divisor (count,) of each of several batches of one size, one after the other in ``gt``."""
        if type(self).divisor is CELoss.divisor and (self.weight is None or gt.is_floating_point()):
            return self.labelled(gt).reshape(count, -1).sum(1)
        return super().divisors(gt, count)

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        knows_all = is_complete(self, gt)
        pred, gt = as_classes_or_shares(pred, gt, type(self).__name__)
        dtype, pred = pred.dtype, _without_overflow(pred)
        if self._is_plain and not gt.is_floating_point():
            labels = gt.long()
            mean = _cross_entropy(self, pred, labels, reduction="mean")
            if not knows_all:
                # Torch's mean over no labels is NaN.
                mean = mean.masked_fill((labels == self.ignore_index).all(), 0)
            return mean.to(dtype)
        known = self.labelled(gt)
        weight = None if self.weight is None else self.weight.of(pred)
        if gt.is_floating_point():
            labels = torch.where(known.unsqueeze(1), gt, 0)
            losses = F.cross_entropy(
                pred, labels, weight=weight, reduction="none", label_smoothing=self.label_smoothing
            )
            # Smoothing gives missing labels a loss too.
            total = torch.where(known, losses, 0).sum()
        else:
            labels = torch.where(known, gt.long(), self.ignore_index)
            total = _cross_entropy(
                self, pred, labels, reduction="sum", weight=weight, label_smoothing=self.label_smoothing
            )
        return over(total, self.divisor(gt).to(total.dtype)).to(dtype)


def _without_overflow(pred: Tensor) -> Tensor:
    """Return float16 predictions in float32, in which sums over a batch do not overflow."""
    return pred.float() if pred.dtype == torch.float16 else pred


def _cross_entropy(loss: CELoss | SegLoss, pred: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Return torch's cross-entropy of the labelled entries."""
    try:
        return F.cross_entropy(pred, labels, ignore_index=loss.ignore_index, **options)
    except IndexError as cause:
        raise _no_class(loss, pred, cause) from cause


def _no_class(loss: AbsLoss, pred: Tensor, cause: Exception) -> UsageError:
    """Return the error for labels out of the range of the classes."""
    return UsageError(
        f"{type(loss).__name__}: labels must be from 0 to {pred.shape[1] - 1} for predictions of shape "
        f"{tuple(pred.shape)}, or ignore_index, {loss.ignore_index}, for missing ones: {cause}"
    )


class SegLoss(AbsLoss):
    """Cross-entropy of logits ``(batch, classes, h, w)`` and labels ``(batch, h, w)``, averaged over labelled pixels.

    A batch without any labelled pixel gives 0.

    Args:
        ignore_index: Label of pixels to ignore. Labels may be floating point, as in LibMTL's data sets.

    Raises:
        UsageError: Shapes of predictions and labels do not match.
    """

    ignore_index: int

    def __init__(self, ignore_index: int = -1) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def labelled(self, gt: Tensor) -> Tensor:
        """Return where pixels have a class."""
        return differs(gt, self.ignore_index) & ~gt.isnan()

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean cross-entropy of the labelled pixels."""
        pred, gt = as_classes(pred, gt, type(self).__name__)
        known = self.labelled(gt)
        labels = torch.where(known, gt if gt.is_floating_point() else gt.long(), self.ignore_index).long()
        return (_cross_entropy(self, _without_overflow(pred), labels, reduction="sum") / known.sum().clamp(min=1)).to(
            pred.dtype
        )


class FocalLoss(AbsLoss):
    """Focal loss of logits, averaged over the labelled entries: ``-alpha_t (1 - p_t)^gamma log p_t``.

    Here p_t is the probability of the true class; well-classified examples count less. Logits of the labels' shape
    are those of binary labels (sigmoid); logits ``(batch, classes, ...)`` with class indices ``(batch, ...)`` are those
    of several classes (softmax). The mean is over entries, not over weights; ``gamma=0`` without ``alpha`` is the
    cross-entropy.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017 (https://arxiv.org/abs/1708.02002), who use
    ``gamma=2`` and ``alpha=0.25``.

    Args:
        gamma: Exponent that reduces the weight of well-classified examples.
        alpha: For binary labels the weight of class 1, that of class 0 being ``1 - alpha``; for several classes the
            weight of each.
        ignore_index: The integer that marks a missing label; missing floating-point labels are NaN.

    Raises:
        UsageError: The arguments are out of range; with predictions and labels, shapes do not match.
    """

    ignore_index: int

    def __init__(
        self, gamma: float = 2.0, alpha: float | Sequence[float] | Tensor | None = None, ignore_index: int = -100
    ) -> None:
        super().__init__()
        if not (math.isfinite(gamma) and gamma >= 0):
            raise UsageError(f"gamma must be a finite number of at least 0, got {gamma!r}.")
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.alpha = alpha if alpha is None or isinstance(alpha, int | float) else PerClass(alpha, "alpha")
        if isinstance(self.alpha, int | float) and not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha must be from 0 to 1, or one weight per class, got {alpha!r}.")

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean focal loss."""
        both = isinstance(pred, Tensor) and isinstance(gt, Tensor)
        if both and (pred.shape == gt.shape or same_but_ones(pred, gt)):
            return self._binary(pred, gt)
        return self._multi_class(pred, gt)

    def _binary(self, pred: Tensor, gt: Tensor) -> Tensor:
        if isinstance(self.alpha, PerClass):
            raise UsageError(
                f"alpha must be one number for binary labels, got a vector for labels of shape {tuple(gt.shape)} and "
                f"predictions of shape {tuple(pred.shape)}."
            )
        pred, gt = as_entries(pred, gt, type(self).__name__)
        known = lined_up(self.labelled(gt), gt)
        true = torch.where(known, gt, 0).to(pred.dtype)
        one, zero = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
        losses = one * true * self._focal(F.logsigmoid(pred), F.logsigmoid(-pred))
        losses = losses + zero * (1 - true) * self._focal(F.logsigmoid(-pred), F.logsigmoid(pred))
        return mean_known(losses, known)

    def _multi_class(self, pred: Tensor, gt: Tensor) -> Tensor:
        if isinstance(self.alpha, int | float):
            raise UsageError(
                f"alpha must be None or one weight per class for several classes, got {self.alpha!r} for predictions "
                f"of shape {tuple(pred.shape)}."
            )
        if isinstance(pred, Tensor) and isinstance(gt, Tensor) and gt.is_floating_point():
            refuse_real(pred, gt, type(self).__name__, "binary labels")
        pred, gt = as_classes(pred, gt, type(self).__name__)
        known = self.labelled(gt)
        classes = torch.where(known, gt, 0).long().unsqueeze(1)
        whole = pred.logsumexp(1, keepdim=True)
        try:
            others = pred.scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True)
        except RuntimeError as cause:
            if "out of bounds" not in str(cause):
                raise
            raise _no_class(self, pred, cause) from cause
        losses = self._focal(pred.gather(1, classes) - whole, others - whole)
        if self.alpha is not None:
            losses = losses * self.alpha.of(pred)[classes]
        return mean_known(losses.squeeze(1), known)

    def _focal(self, log_true: Tensor, log_false: Tensor) -> Tensor:
        # Computed by its logarithm, the power has a finite gradient at 0 for every gamma.
        return -(self.gamma * log_false).exp() * log_true if self.gamma else -log_true
