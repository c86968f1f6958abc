"""Metrics of class labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl._loss.base import differs
from fastmtl._metrics.base import Sums, ratio, totals
from fastmtl.errors import UsageError
from fastmtl.support.shapes import as_classes

__all__ = ["AccMetric", "F1Metric", "SegMetric"]


class AccMetric(Sums):
    """Accuracy: the share of labels ``gt`` (any shape) equal to the arg max of ``pred`` ``(*gt.shape, classes)``.

    Labels may also be ``(*shape, 1)``, and predictions ``(batch, classes, ...)``, as for the losses; where both layouts
    fit, as for ``(batch, 5, 5)``, dimension 1 are the classes.

    Args:
        ignore_index: Label of entries to ignore, as NaN is.
    """

    missing = -100
    adds_rows = True

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        if self.missing is not None:
            self.missing = ignore_index

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Count the right predictions of one batch. A UsageError if shapes do not match."""
        chosen, gt = _chosen(pred, gt, type(self).__name__)
        if gt.numel():
            # Counts are exact, a mean in float32 times a count is not.
            known = differs(gt, self.ignore_index) & ~gt.isnan()
            self._add(totals((chosen.eq(gt) & known).sum(), known.sum()))


def _chosen(pred: Tensor, gt: Tensor, who: str) -> tuple[Tensor, Tensor]:
    """Return the most probable classes and the labels, in one shape."""
    both = isinstance(pred, Tensor) and isinstance(gt, Tensor) and pred.dim() > 1 and pred.shape[-1] > 1
    if both and gt.shape in (pred.shape[:-1], (*pred.shape[:-1], 1)) and pred.shape[:-1] != _without_classes(pred):
        return pred.argmax(-1), gt.reshape(pred.shape[:-1])
    pred, gt = as_classes(pred, gt, who)
    return pred.argmax(1), gt


def _without_classes(pred: Tensor) -> tuple[int, ...]:
    return (*pred.shape[:1], *pred.shape[2:])


class _Confusion(Sums):
    missing = -1
    adds_rows = True

    def __init__(self, num_classes: int = 13) -> None:
        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes must be at least 2, got {num_classes}.")
        self.num_classes = num_classes

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Count logits ``(batch, classes, ...)`` against labels ``(batch, ...)``; labels outside 0 .. C-1 are skipped.

        Raises:
            UsageError: ``pred`` does not have ``num_classes`` channels, or the shapes do not match.
        """
        count = self.num_classes
        if isinstance(pred, Tensor) and (pred.dim() < 2 or pred.shape[1] != count):
            raise UsageError(
                f"{type(self).__name__} is for {count} classes, so pred must be (batch, {count}, ...), "
                f"got shape {tuple(pred.shape)}."
            )
        pred, gt = as_classes(pred, gt, type(self).__name__)
        labels, chosen = torch.where(gt.isnan(), -1, gt).long().flatten(), pred.argmax(1).flatten()
        known = (labels >= 0) & (labels < count)
        # An extra bin for skipped labels: selecting the others would wait for their number.
        bins = torch.where(known, count * labels + chosen, count * count)
        self._add(bins.new_zeros(count * count + 1).scatter_add_(0, bins, torch.ones_like(bins)))

    def confusion(self) -> Tensor:
        """Return the counts of class i (row) predicted as class j, ``(C, C)`` float64; waits for the device."""
        return self._read()[:-1].reshape(self.num_classes, self.num_classes).double()

    def accuracy(self) -> float:
        """Return the share of correct predictions, NaN without labels; waits for the device."""
        counts = self.confusion()
        return ratio(counts.trace().item(), counts.sum().item())


class SegMetric(_Confusion):
    """Mean intersection over union and pixel accuracy of a segmentation, ``[mIoU, pixAcc]``.

    Classes that neither occur nor are predicted have no intersection over union and are left out of the mean; LibMTL's
    is NaN then.

    Args:
        num_classes: The number C of classes; labels outside 0 .. C-1 are skipped.
    """

    def score_fun(self) -> list[float]:
        """Return ``[mIoU, pixAcc]``, NaN without labelled pixels."""
        counts = self.confusion()
        right = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - right
        return [(right / union).nanmean().item(), self.accuracy()]


class F1Metric(_Confusion):
    """F1 score: the harmonic mean of precision and recall, ``2 TP / (2 TP + FP + FN)``.

    Args:
        num_classes: The number of classes; labels outside 0 .. C-1 are skipped.
        average: ``"macro"``, the mean over classes that occur or are predicted; ``"micro"``, of all counts together;
            ``"binary"``, of class 1 alone.

    Raises:
        UsageError: An unknown average, or ``"binary"`` with other than two classes.
    """

    def __init__(self, num_classes: int, average: str = "macro") -> None:
        super().__init__(num_classes)
        if average not in ("macro", "micro", "binary"):
            raise UsageError(f"average must be macro, micro or binary, got {average!r}.")
        if average == "binary" and num_classes != 2:
            raise UsageError(f"average='binary' needs num_classes=2, got {num_classes}.")
        self.average = average

    def score_fun(self) -> list[float]:
        """Return the score as a list of one, NaN without labels."""
        counts = self.confusion()
        if not counts.any():
            return [math.nan]
        right, both = counts.diagonal(), counts.sum(0) + counts.sum(1)
        if self.average == "micro":
            return [ratio(2 * right.sum().item(), both.sum().item())]
        scores = 2 * right / both
        return [scores[1].nan_to_num().item() if self.average == "binary" else scores.nanmean().item()]
