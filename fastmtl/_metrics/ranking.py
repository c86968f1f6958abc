"""Metrics of the order of predictions: areas under the ROC curve, of all rows or of each user's, and log loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl._metrics.base import AbsMetric, Sums, totals
from fastmtl.errors import UsageError
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.shapes import as_entries

__all__ = ["AUCMetric", "GAUCMetric", "LogLossMetric"]


class _Binary(Sums):
    """Sums of logits and labels, with a count of labels that cannot be."""

    missing = -1
    adds_rows = True
    kept = ("sums", "bad")
    labels = ""

    def _count_bad(self, bad: Tensor) -> None:
        # Looking at them would wait for the device.
        before = self._kept["bad"]
        self._kept["bad"] = bad.sum() if before is None else before + bad.sum()

    def _check(self) -> None:
        """Refuse labels that cannot be, and scores without a batch; waits for the device."""
        bad = self._kept["bad"]
        if bad is None:
            raise UsageError(f"{type(self).__name__} has no batch to score: is the data loader empty?")
        _refuse_labels(self, int(bad), self.labels)


def _refuse_labels(metric: AbsMetric, bad: int, labels: str) -> None:
    if bad:
        raise UsageError(f"{type(metric).__name__} needs labels {labels}, got {bad} others.")


def _is_missing(gt: Tensor) -> Tensor:
    return gt.isnan() | (gt == -1)


def _wide(pred: Tensor) -> Tensor:
    """Return predictions in float32, or in float64 if they are."""
    return pred.detach().to(torch.promote_types(pred.dtype, torch.float32))


class AUCMetric(_Binary):
    """Area under the ROC curve of logits (or any scores) and labels 0 or 1: how probably a 1 is ranked above a 0.

    Ties count one half. NaN without labels of both kinds, and if a prediction with a label is NaN.

    Args:
        bins: If None, all predictions are kept on their device, and the area is exact. Otherwise counts are kept in
            this many bins of the sigmoid of the predictions, which is exact up to ties within a bin.

    Raises:
        UsageError: ``bins`` is below 2; or labels that are neither 0, 1 nor missing, when it is scored.
    """

    # Of this class, as update_fun is.
    missing = -1
    adds_rows = True
    labels = "0 and 1"

    def __init__(self, bins: int | None = None) -> None:
        super().__init__()
        if bins is not None and bins < 2:
            raise UsageError(f"bins must be at least 2, got {bins}.")
        self.bins = bins

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Take in the logits and labels of one batch, of one shape; labels that are NaN or -1 are missing."""
        pred, gt = as_entries(pred, gt, type(self).__name__)
        scores, gt = _wide(pred).flatten(), gt.flatten()
        is_one, is_zero = gt == 1, gt == 0
        self._count_bad(~(is_one | is_zero | _is_missing(gt)))
        if self.bins is None:
            self.record.append(torch.stack([scores, torch.where(is_one, 1.0, torch.where(is_zero, 0.0, -1.0))]))
            return
        shares = scores.sigmoid().to(wide_dtype(scores.device))
        place = (shares.nan_to_num() * self.bins).long().clamp(0, self.bins - 1)
        # Behind the bins, how many predictions are NaN.
        counts = torch.zeros(2 * self.bins + 1, dtype=torch.int64, device=scores.device)
        for number, chosen in enumerate((is_zero, is_one)):
            counts.index_add_(0, place + number * self.bins, chosen.long())
        counts[-1] = (scores.isnan() & (is_zero | is_one)).sum()
        self._add(counts)

    def score_fun(self) -> list[float]:
        """Return the area, from 0 to 1; waits for the device."""
        self._check()
        if self.bins is not None:
            *counts, unordered = self._read().double().split([self.bins, self.bins, 1])
            return [math.nan if unordered else _area(*counts)]
        scores, labels = torch.cat([part.cpu() for part in self.record], 1)
        return [_area(*_counts(scores[labels >= 0], labels[labels >= 0]))]


def _counts(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many labels 0 and 1 each distinct score has, in ascending order; NaN if a score is NaN."""
    if scores.isnan().any():
        return torch.full((1,), torch.nan), torch.full((1,), torch.nan)
    distinct, place = scores.unique(return_inverse=True)
    ones = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, place, labels.double())
    every = torch.zeros_like(ones).index_add_(0, place, torch.ones_like(labels.double()))
    return every - ones, ones


def _area(zeros: Tensor, ones: Tensor) -> float:
    """Return the share of pairs of a 1 and a 0 in which the 1 has the greater score, from counts by score."""
    pairs = zeros.sum() * ones.sum()
    below = zeros.cumsum(0) - zeros
    return float((ones * (below + zeros / 2)).sum() / pairs) if pairs else math.nan


class GAUCMetric(AbsMetric):
    """Area under the ROC curve within each user, averaged by the users' numbers of rows.

    Labels are (n, 2): 0 or 1, and the user's number, in a dtype that tells the users apart: float32 does below 2**24,
    float64 and int64 below 2**53. Users with labels of one kind only are left out; it is NaN if a prediction with a
    label is NaN. The loss of such labels is ``fastmtl.loss.FirstColumn``'s.

    Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017.
    """

    adds_rows = True

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Take in logits (n,) or (n, 1) and labels (n, 2) of one batch; labels that are NaN or -1 are missing.

        Raises:
            UsageError: The shapes do not match.
        """
        if gt.dim() != 2 or gt.shape[1] != 2 or pred.numel() != len(gt):
            raise UsageError(
                "GAUCMetric takes one logit of each row and labels (n, 2) of 0 or 1 and a user, got shapes "
                f"{tuple(pred.shape)} and {tuple(gt.shape)}."
            )
        exact = 2**53 if not gt.is_floating_point() else int(2 / torch.finfo(gt.dtype).eps)
        collides = gt[:, 1:].abs() >= exact
        self.record.append(torch.cat([pred.detach().reshape(-1, 1).double(), gt.double(), collides.double()], 1))

    def score_fun(self) -> list[float]:
        """Return the mean area, NaN if no user has labels of both kinds; waits for the device.

        Raises:
            UsageError: No batch, labels that are neither 0, 1 nor missing, or users that their dtype cannot tell apart.
        """
        if not self.record:
            raise UsageError("GAUCMetric has no batch to score: is the data loader empty?")
        rows = torch.cat([part.cpu() for part in self.record])
        labelled = (rows[:, 1] == 0) | (rows[:, 1] == 1)
        _refuse_labels(self, int((~labelled & ~_is_missing(rows[:, 1])).sum()), "0 and 1")
        if rows[:, 3].any():
            raise UsageError(
                "The numbers of users in GAUCMetric's labels are too large for their dtype, which cannot tell them "
                "apart: pass labels in float64 or int64, with users below 2**53."
            )
        rows = rows[labelled]
        if rows[:, 0].isnan().any():
            return [math.nan]
        rows = rows[rows[:, 2].argsort(stable=True)]
        _, sizes = rows[:, 2].unique_consecutive(return_counts=True)
        total = weight = 0.0
        for part in rows.split(sizes.tolist()):
            area = _area(*_counts(part[:, 0], part[:, 1]))
            if not math.isnan(area):
                total, weight = total + len(part) * area, weight + len(part)
        return [total / weight if weight else math.nan]


class LogLossMetric(_Binary):
    """Mean binary cross-entropy of logits and labels from 0 to 1.

    Raises:
        UsageError: Labels that are neither from 0 to 1 nor missing, when it is scored.
    """

    # Of this class, as update_fun is.
    missing = -1
    adds_rows = True
    labels = "from 0 to 1"

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Add the losses of one batch, of one shape; labels that are NaN or -1 are missing."""
        pred, gt = as_entries(pred, gt, type(self).__name__)
        known = (gt >= 0) & (gt <= 1)
        self._count_bad(~(known | _is_missing(gt)))
        scores = _wide(pred)
        true = torch.where(known, gt, 0).to(scores.dtype)
        losses = F.binary_cross_entropy_with_logits(scores, true, reduction="none")
        self._add(totals(torch.where(known, losses, 0), known))

    def score_fun(self) -> list[float]:
        """Return the mean, NaN without labels; waits for the device."""
        self._check()
        return super().score_fun()
