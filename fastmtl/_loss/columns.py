"""Losses of a part of the labels."""

from __future__ import annotations

from torch import Tensor

from fastmtl._loss.base import AbsLoss
from fastmtl.errors import UsageError

__all__ = ["FirstColumn"]


class FirstColumn(AbsLoss):
    """A loss of the first column of labels (n, columns); the others, such as a user's number, are for a metric.

    Args:
        loss: The loss of predictions (n, 1) and labels (n, 1).
    """

    def __init__(self, loss: AbsLoss) -> None:
        super().__init__()
        self.loss = loss

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the loss of the first column.

        Raises:
            UsageError: The labels have no columns.
        """
        if gt.dim() != 2:
            raise UsageError(f"FirstColumn takes labels (n, columns), got shape {tuple(gt.shape)}.")
        first = gt[:, :1]
        return self.loss.compute_loss(pred, first.to(pred.dtype) if first.is_floating_point() else first)

    def labelled(self, gt: Tensor) -> Tensor:
        """Return where the first column has a label, in all columns."""
        return self.loss.labelled(gt[:, :1]).expand_as(gt)
