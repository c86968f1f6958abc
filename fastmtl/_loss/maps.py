"""Losses of depth and surface normals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl._loss.base import AbsLoss, mean_known, present
from fastmtl.support.shapes import as_entries, as_normals

__all__ = ["DepthLoss", "NormalLoss", "known_depth"]


class DepthLoss(AbsLoss):
    """Mean absolute error of depths ``(batch, 1, h, w)`` over the pixels whose true depth is neither 0 nor NaN.

    Either may come as ``(batch, h, w)``. A batch without any such pixel gives 0.

    Raises:
        UsageError: Predictions and labels do not have such shapes.
    """

    def labelled(self, gt: Tensor) -> Tensor:
        """Return which pixels have a depth, ``(batch, 1, h, w)`` or as they come."""
        return known_depth(gt)

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``|pred - gt|`` over the pixels with a depth."""
        pred, gt = as_entries(pred, gt, type(self).__name__)
        return mean_known((pred - gt).abs(), self.labelled(gt))


class NormalLoss(AbsLoss):
    """One minus the cosine of the angle to true unit normals ``(batch, 3, h, w)``, averaged; 0 without any normal.

    Pixels whose true components sum to 0 do not count, as in LibMTL: that is how a missing normal is stored; nor do
    those with a NaN. The prediction needs no unit length.

    Raises:
        UsageError: Predictions and labels do not have such shapes.
    """

    def labelled(self, gt: Tensor) -> Tensor:
        """Return which pixels have a normal, ``(batch, h, w)``."""
        return present(gt.sum(1))

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``1 - <pred, gt> / |pred|`` over the pixels with a normal."""
        as_normals(pred, gt, type(self).__name__)
        valid = self.labelled(gt)
        cosine = (F.normalize(pred, dim=1) * torch.where(valid.unsqueeze(1), gt, 0)).sum(1)
        return mean_known(1 - cosine, valid)


def known_depth(gt: Tensor) -> Tensor:
    """Return which pixels have a depth: of ``(batch, channels, h, w)`` as ``(batch, 1, h, w)``."""
    return present(gt.sum(1, keepdim=True) if gt.dim() == 4 else gt)
