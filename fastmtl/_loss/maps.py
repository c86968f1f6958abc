"""Losses of depth and surface normals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl._loss.base import AbsLoss, mean_known, present
from fastmtl.support.shapes import as_entries, check_normals

__all__ = ["DepthLoss", "NormalLoss", "known_depth"]


class DepthLoss(AbsLoss):
    """Mean absolute error of depths ``(batch, 1, h, w)`` over the pixels whose true depth is neither 0 nor NaN.

    Both may also be ``(batch, h, w)``. A batch without any such pixel gives 0.
    """

    def labelled(self, gt: Tensor) -> Tensor:
        """Return which pixels have a depth, in the labels' shape with one channel."""
        return known_depth(gt)

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``|pred - gt|`` over the pixels with a depth."""
        pred, gt = as_entries(pred, gt, type(self).__name__)
        return mean_known((pred - gt).abs(), self.labelled(gt))


class NormalLoss(AbsLoss):
    """One minus the cosine of the angle to true unit normals ``(batch, 3, h, w)``, averaged; 0 without any normal.

    Pixels whose true components sum to 0, which marks a missing normal in LibMTL, or to NaN are left out. Predictions
    need not have unit length.
    """

    def labelled(self, gt: Tensor) -> Tensor:
        """Return which pixels have a normal, ``(batch, h, w)``."""
        return present(gt.sum(1))

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``1 - <pred, gt> / |pred|`` over the pixels with a normal."""
        check_normals(pred, gt, type(self).__name__)
        valid = self.labelled(gt)
        cosine = (F.normalize(pred, dim=1) * torch.where(valid.unsqueeze(1), gt, 0)).sum(1)
        return mean_known(1 - cosine, valid)


def known_depth(gt: Tensor) -> Tensor:
    """Return which pixels have a depth; ``(batch, 1, h, w)`` for ``(batch, channels, h, w)``."""
    return present(gt.sum(1, keepdim=True) if gt.dim() == 4 else gt)
