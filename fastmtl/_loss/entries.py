"""Elementwise losses, averaged over the labelled entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl._loss.base import AbsLoss, PerClass, is_complete, mean_known
from fastmtl.errors import UsageError
from fastmtl.support.shapes import as_entries, lined_up

__all__ = ["BCELoss", "HuberLoss", "KLDivLoss", "L1Loss", "MSELoss"]


class _EntryLoss(AbsLoss):
    """The mean of one of torch's losses over all labelled entries.

    Predictions and labels have the same shape, but for dimensions of 1 that only one of them has, as ``(batch, 1)`` and
    ``(batch,)``; other shapes raise a ``UsageError``. Integer labels are values.
    """

    ignore_index: int | None = None

    _entries: Callable[..., Tensor]

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean over the labelled entries."""
        knows_all = is_complete(self, gt)
        pred, gt = as_entries(pred, gt, type(self).__name__)
        if knows_all and pred.dtype in (torch.float32, torch.float64):
            return self._entries(pred, gt if gt.is_floating_point() else gt.to(pred.dtype), reduction="none").mean()
        known = lined_up(self.labelled(gt), gt)
        # A NaN label would make its zero gradient NaN.
        true = torch.where(known, gt, 0)
        true = true if true.is_floating_point() else true.to(pred.dtype)
        return mean_known(self._entries(pred, true, reduction="none"), known)


class KLDivLoss(_EntryLoss):
    """Kullback-Leibler divergence of log-probabilities and probabilities, averaged over all labelled entries.

    As in LibMTL this is ``torch.nn.KLDivLoss()``: the mean of ``gt * (log gt - pred)`` over entries, not over rows.
    """

    _entries = staticmethod(F.kl_div)


class L1Loss(_EntryLoss):
    """Mean absolute error of the labelled entries, ``mean(|pred - gt|)``, of one shape but for dimensions of 1."""

    _entries = staticmethod(F.l1_loss)


class MSELoss(_EntryLoss):
    """Mean squared error of the labelled entries, ``mean((pred - gt)^2)``, of one shape but for dimensions of 1."""

    _entries = staticmethod(F.mse_loss)


class HuberLoss(_EntryLoss):
    """Huber loss of the labelled entries: ``e^2 / 2`` up to ``delta``, ``delta (|e| - delta / 2)`` beyond.

    Here e is ``pred - gt``, of one shape but for dimensions of 1.

    Args:
        delta: The error above which the loss is linear.

    Raises:
        UsageError: ``delta`` is not above 0.
    """

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(delta) and delta > 0):
            raise UsageError(f"delta must be a finite number above 0, got {delta!r}.")
        self.delta = delta

    def _entries(self, pred: Tensor, gt: Tensor, reduction: str) -> Tensor:
        return F.huber_loss(pred, gt, reduction=reduction, delta=self.delta)


class BCELoss(_EntryLoss):
    """Binary cross-entropy of logits, averaged over the labelled entries.

    A logit x with label y from 0 to 1 has the loss ``-w y log sigmoid(x) - (1 - y) log (1 - sigmoid(x))``. Missing
    labels are NaN, or ``ignore_index`` among integers.

    Args:
        pos_weight: Weight w of the label 1: a number, or one per column of ``(batch, columns, ...)``; 1 if None.
        ignore_index: The integer that marks a missing label.

    Raises:
        UsageError: The weights are out of range; with predictions and labels, shapes do not match.
    """

    def __init__(self, pos_weight: float | Sequence[float] | Tensor | None = None, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        one = pos_weight is not None and torch.as_tensor(pos_weight).numel() == 1
        self.pos_weight: float | PerClass | None = None
        if one:
            self.pos_weight = float(PerClass(torch.as_tensor(pos_weight).reshape(1), "pos_weight").values)
        elif pos_weight is not None:
            self.pos_weight = PerClass(pos_weight, "pos_weight")

    def _entries(self, pred: Tensor, gt: Tensor, reduction: str) -> Tensor:
        if self.pos_weight is None:
            return F.binary_cross_entropy_with_logits(pred, gt, reduction=reduction)
        if isinstance(self.pos_weight, PerClass):
            weight: float | Tensor = self.pos_weight.of(pred).reshape(-1, *[1] * (pred.dim() - 2))
        else:
            weight = self.pos_weight
        return -weight * gt * F.logsigmoid(pred) - (1 - gt) * F.logsigmoid(-pred)
