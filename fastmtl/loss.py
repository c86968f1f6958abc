"""Losses of tasks: a pure ``compute_loss`` and a running mean for the log.

Example::

    class HuberLoss(AbsLoss):
        def compute_loss(self, pred, gt):
            return torch.nn.functional.huber_loss(pred, gt)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.running import RunningMean

if TYPE_CHECKING:
    from fastmtl.distributed import Peers

__all__ = ["AbsLoss", "CELoss", "DepthLoss", "KLDivLoss", "L1Loss", "MSELoss", "NormalLoss", "SegLoss"]

_FORMERLY = {"CE_loss_fn": "CELoss", "KL_loss_fn": "KLDivLoss", "L1_loss_fn": "L1Loss", "MSE_loss_fn": "MSELoss"}


def __getattr__(name: str) -> Any:
    if name in _FORMERLY:
        raise UsageError(
            f"{name} is now the class {_FORMERLY[name]}: write {{'loss_fn': {_FORMERLY[name]}()}} in place of [{name}]."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AbsLoss:
    """Base of all losses: override ``compute_loss`` and nothing else.

    ``compute_loss`` is pure and may run inside ``torch.compile``. ``accumulate`` is called outside of it, once per
    batch.

    Attributes:
        record: Empty unless a subclass overrides ``_update_loss`` and appends its losses here, as floats.
        bs: The batch sizes that belong to ``record``.
    """

    def __init__(self) -> None:
        self.record: list[float] = []
        self.bs: list[int] = []
        self._running = RunningMean()

    def compute_loss(self, pred: Any, gt: Any) -> Tensor:
        """Return the loss of one batch, a scalar averaged over the batch.

        Args:
            pred: What the task's decoder gave, ``(batch, ...)``.
            gt: The labels, ``(batch, ...)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute_loss(pred, gt)")

    def accumulate(self, loss: Tensor, batch_size: int) -> None:
        """Add the loss of one batch to the running mean, weighted by ``batch_size``; never waits for the device.

        Raises:
            UsageError: ``loss`` is not a scalar.
        """
        if loss.numel() != 1:
            raise UsageError(
                f"compute_loss of {type(self).__name__} must return a scalar tensor, got shape {tuple(loss.shape)}."
            )
        self._running.add(loss, batch_size)

    def _update_loss(self, pred: Any, gt: Any) -> Tensor:
        loss = self.compute_loss(pred, gt)
        self.accumulate(loss, pred.size()[0])
        return loss

    def _average_loss(self) -> float:
        if self.record:
            return sum(loss * size for loss, size in zip(self.record, self.bs, strict=True)) / sum(self.bs)
        if self._running.empty:
            raise UsageError(f"{type(self).__name__} has no batch to average: is the data loader empty?")
        return self._running.value()

    def _reinit(self) -> None:
        self.record = []
        self.bs = []
        self._running.reset()

    def _sync(self, peers: Peers) -> None:
        """Take in what the other processes have accumulated."""
        self.record = [loss for losses in peers.gather(self.record) for loss in losses]
        self.bs = [size for sizes in peers.gather(self.bs) for size in sizes]
        self._running.sync(peers)


class CELoss(AbsLoss):
    """Cross-entropy of logits ``(batch, classes, ...)`` and class indices ``(batch, ...)``, averaged over entries."""

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(pred, gt)


class KLDivLoss(AbsLoss):
    """Kullback-Leibler divergence of log-probabilities and probabilities, averaged over all entries.

    This is ``torch.nn.KLDivLoss()`` as LibMTL uses it: the mean is over entries, not over the batch.
    """

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``gt * (log gt - pred)``."""
        # reduction="mean" gives the same number with a warning in every step.
        return F.kl_div(pred, gt, reduction="none").mean()


class L1Loss(AbsLoss):
    """Mean absolute error."""

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``|pred - gt|``."""
        return F.l1_loss(pred, gt)


class MSELoss(AbsLoss):
    """Mean squared error."""

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``(pred - gt)^2``."""
        return F.mse_loss(pred, gt)


class SegLoss(AbsLoss):
    """Cross-entropy of logits ``(batch, classes, h, w)`` and labels ``(batch, h, w)``, averaged over labelled pixels.

    A batch without any labelled pixel gives 0.

    Args:
        ignore_index: Label of pixels that do not count. Labels may be floating point, as LibMTL's data sets hold them.
    """

    def __init__(self, ignore_index: int = -1) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean cross-entropy of the labelled pixels."""
        labels = gt.long()
        total = F.cross_entropy(pred, labels, ignore_index=self.ignore_index, reduction="sum")
        return total / (labels != self.ignore_index).sum().clamp(min=1)


class DepthLoss(AbsLoss):
    """Mean absolute error of depths ``(batch, 1, h, w)`` over the pixels whose true depth is not 0; 0 without any."""

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``|pred - gt|`` over the pixels with a depth."""
        valid = gt.sum(1, keepdim=True) != 0
        return torch.where(valid, (pred - gt).abs(), 0).sum() / valid.sum().clamp(min=1)


class NormalLoss(AbsLoss):
    """One minus the cosine of the angle to true unit normals ``(batch, 3, h, w)``, averaged; 0 without any normal.

    Pixels whose true components sum to 0 do not count, as in LibMTL: that is how a missing normal is stored. The
    prediction needs no unit length.
    """

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``1 - <pred, gt> / |pred|`` over the pixels with a normal."""
        valid = gt.sum(1) != 0
        cosine = (F.normalize(pred, dim=1) * gt).sum(1)
        return torch.where(valid, 1 - cosine, 0).sum() / valid.sum().clamp(min=1)
