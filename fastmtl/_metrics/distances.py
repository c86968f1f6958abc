"""Errors of real numbers, depths and surface normals."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl._loss.base import present
from fastmtl._loss.maps import known_depth
from fastmtl._metrics.base import Sums, ratio, totals
from fastmtl.errors import UsageError
from fastmtl.support.shapes import as_entries, check_normals

__all__ = ["DepthMetric", "L1Metric", "NormalMetric"]


class L1Metric(Sums):
    """Mean absolute error of the labels that are not NaN, of all batches together.

    Predictions and labels have the same shape, but for dimensions of 1 that only one of them has.

    Args:
        scale: What the error is multiplied by: the standard deviation where labels are standardised, for an error in
            their unit.

    Raises:
        UsageError: ``scale`` is not above 0.
    """

    missing = math.nan
    adds_rows = True

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise UsageError(f"scale of L1Metric must be above 0, got {scale}.")
        self.scale = float(scale)

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Add the absolute errors of one batch. A UsageError if shapes do not match."""
        pred, gt = as_entries(pred, gt, type(self).__name__)
        known = ~gt.isnan()
        self._add(totals(torch.where(known, (pred - gt).abs(), 0), known))

    def score_fun(self) -> list[float]:
        """Return the mean error times ``scale``, NaN without labels; waits for the device.

        Raises:
            UsageError: There was no batch.
        """
        return [self.scale * score for score in super().score_fun()]


class DepthMetric(Sums):
    """Absolute and relative error of depths ``(batch, 1, h, w)``, ``[abs_err, rel_err]``.

    Means of ``|pred - gt|`` and ``|pred - gt| / gt`` over all pixels whose true depth is neither 0 nor NaN. Both may
    also be ``(batch, h, w)``.
    """

    missing = math.nan
    adds_rows = True

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Add one batch. A UsageError if shapes do not match."""
        pred, gt = as_entries(pred, gt, type(self).__name__)
        valid = known_depth(gt)
        error = torch.where(valid, (pred - gt).abs(), 0)
        relative = error / torch.where(valid, gt, 1)
        self._add(totals(error, relative, valid.expand_as(gt)))

    def score_fun(self) -> list[float]:
        """Return ``[abs_err, rel_err]``, NaN without a pixel of known depth."""
        absolute, relative, count = self._read().tolist()
        return [ratio(absolute, count), ratio(relative, count)]


class NormalMetric(Sums):
    """Angle between predicted and true normals ``(batch, 3, h, w)``: mean and median in degrees, shares below a limit.

    The scores are ``[mean, median, <11.25, <22.5, <30]`` over all pixels whose true components sum neither to 0 nor to
    NaN (a missing normal). The median is that of angles counted in ``BINS`` steps of 180 degrees, exact to 1e-4,
    so that a pass over a data set needs 8 MB and not all of its pixels.
    """

    BINS = 2**20
    LIMITS = (11.25, 22.5, 30.0)
    kept = ("sums", "histogram")
    missing = math.nan
    adds_rows = True

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Add one batch, whose true normals have unit length. A UsageError if shapes do not match."""
        check_normals(pred, gt, type(self).__name__)
        known = present(gt.sum(1))
        valid = known.flatten()
        cosine = (F.normalize(pred, dim=1) * torch.where(known.unsqueeze(1), gt, 0)).sum(1).clamp(-1, 1).flatten()
        degrees = torch.where(valid, torch.rad2deg(torch.acos(cosine)), 0)
        self._add(totals(degrees, *((degrees < limit) & valid for limit in self.LIMITS), valid))
        bins = (degrees * (self.BINS / 180)).long().clamp(0, self.BINS - 1)
        histogram = self._kept["histogram"]
        if histogram is None:
            histogram = self._kept["histogram"] = bins.new_zeros(self.BINS)
        histogram.scatter_add_(0, bins, valid.long())

    def score_fun(self) -> list[float]:
        """Return ``[mean, median, <11.25, <22.5, <30]``, NaN without a normal."""
        total, *below, count = self._read().tolist()
        return [ratio(total, count), self._median(int(count)), *(ratio(share, count) for share in below)]

    def _median(self, count: int) -> float:
        histogram = self._kept["histogram"]
        if count == 0 or histogram is None:
            return math.nan
        ranks = torch.tensor([(count + 1) // 2, count // 2 + 1])
        middle = torch.searchsorted(histogram.cpu().cumsum(0), ranks)
        return ((middle.double() + 0.5) * (180 / self.BINS)).mean().item()
