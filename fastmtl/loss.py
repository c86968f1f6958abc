"""Losses of tasks: a pure ``compute_loss`` and a running mean for the log.

Example::

    class HuberLoss(AbsLoss):
        def compute_loss(self, pred, gt):
            return torch.nn.functional.huber_loss(pred, gt)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.support.running import Group, RunningMean

__all__ = ["AbsLoss", "CELoss", "DepthLoss", "KLDivLoss", "L1Loss", "MSELoss", "NormalLoss", "SegLoss"]

_FORMERLY = {"CE_loss_fn": "CELoss", "KL_loss_fn": "KLDivLoss", "L1_loss_fn": "L1Loss", "MSE_loss_fn": "MSELoss"}

# The losses, batch sizes and running sums of an `AbsLoss`.
LossState = tuple[list[float], list[int], tuple[Tensor | None, float | Tensor]]


def __getattr__(name: str) -> NoReturn:
    if name in _FORMERLY:
        raise UsageError(
            f"{name} is now the class {_FORMERLY[name]}: write {{'loss_fn': {_FORMERLY[name]}()}} in place of [{name}]."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AbsLoss:
    """Base of all losses: override ``compute_loss`` and nothing else.

    ``compute_loss`` is pure and may run inside ``torch.compile``. ``accumulate`` is called outside of it, once per
    batch. The losses of this module average over the labels that are there, :meth:`labelled`; a batch without any gives
    0 with zero gradients.

    Attributes:
        ignore_index: The class label that stands for a missing one. Among real numbers it is NaN.
        record: Empty unless a subclass overrides ``_update_loss`` and appends its losses here, as floats.
        bs: The batch sizes that belong to ``record``.
    """

    ignore_index: int = -100

    _running: RunningMean

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Give the loss its sums, also where a class written for LibMTL leaves out ``super().__init__()``."""
        loss = super().__new__(cls)
        loss._running = RunningMean()
        return loss

    def __init__(self) -> None:
        self.record: list[float] = []
        self.bs: list[int] = []

    def compute_loss(self, pred: Any, gt: Any) -> Tensor:
        """Return the loss of one batch, a scalar averaged over it, of predictions and labels, both ``(batch, ...)``."""
        raise NotImplementedError(f"{type(self).__name__} must define compute_loss(pred, gt)")

    def labelled(self, gt: Tensor) -> Tensor:
        """Return where labels are there, as booleans that have an entry, or several, for each row of the batch."""
        return ~gt.isnan() if gt.is_floating_point() else gt != self.ignore_index

    def accumulate(self, loss: Tensor, batch_size: int | Tensor) -> None:
        """Add the loss of one batch to the running mean, weighted by its labelled rows; never waits for the device.

        Raises:
            UsageError: ``loss`` is not a scalar.
        """
        if loss.numel() != 1:
            raise UsageError(
                f"compute_loss of {type(self).__name__} must return a scalar tensor, got shape {tuple(loss.shape)}."
            )
        self._running.add(loss, batch_size)

    def _update_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
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

    def _state(self) -> LossState:
        """Return what has been accumulated, for :meth:`_restore`."""
        return self.record, self.bs, self._running.state()

    def _restore(self, state: LossState) -> None:
        self.record, self.bs, running = state
        self._running.restore(running)

    def sync(self, peers: Group) -> None:
        """Take in what the other processes have accumulated."""
        self.record = [loss for losses in peers.gather(self.record) for loss in losses]
        self.bs = [size for sizes in peers.gather(self.bs) for size in sizes]
        self._running.sync(peers)


class CELoss(AbsLoss):
    """Cross-entropy of logits ``(batch, classes, ...)`` and labels, averaged over the labelled entries.

    Labels are class indices ``(batch, ...)`` or probabilities ``(batch, classes, ...)``.

    Args:
        ignore_index: The class index that stands for a missing label.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def labelled(self, gt: Tensor) -> Tensor:
        """Return where labels are there, ``(batch, ...)``."""
        known = super().labelled(gt)
        return known.all(1) if gt.is_floating_point() else known

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        known = self.labelled(gt)
        if gt.is_floating_point():
            # Probabilities of zero give no loss and no gradient.
            total = F.cross_entropy(pred, torch.where(known.unsqueeze(1), gt, 0), reduction="sum")
        else:
            total = F.cross_entropy(pred, gt, ignore_index=self.ignore_index, reduction="sum")
        return total / known.sum().clamp(min=1)


class _EntryLoss(AbsLoss):
    """The mean of one of torch's losses over all labelled entries."""

    _entries: Callable[..., Tensor]

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean over the labelled entries."""
        known = self.labelled(gt)
        # A NaN would pass through a gradient of zero.
        return mean_known(self._entries(pred, torch.where(known, gt, 0), reduction="none"), known)


class KLDivLoss(_EntryLoss):
    """Kullback-Leibler divergence of log-probabilities and probabilities, averaged over all labelled entries.

    This is ``torch.nn.KLDivLoss()`` as LibMTL uses it, the mean of ``gt * (log gt - pred)`` over entries, not over the
    batch.
    """

    _entries = staticmethod(F.kl_div)


class L1Loss(_EntryLoss):
    """Mean absolute error of the labelled entries."""

    _entries = staticmethod(F.l1_loss)


class MSELoss(_EntryLoss):
    """Mean squared error of the labelled entries."""

    _entries = staticmethod(F.mse_loss)


def mean_known(values: Tensor, known: Tensor) -> Tensor:
    """Return the mean of the values that are known, 0 if none is."""
    known = known.expand_as(values)
    return torch.where(known, values, 0).sum() / known.sum().clamp(min=1)


class SegLoss(AbsLoss):
    """Cross-entropy of logits ``(batch, classes, h, w)`` and labels ``(batch, h, w)``, averaged over labelled pixels.

    A batch without any labelled pixel gives 0.

    Args:
        ignore_index: Label of pixels that do not count. Labels may be floating point, as LibMTL's data sets hold them.
    """

    def __init__(self, ignore_index: int = -1) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def labelled(self, gt: Tensor) -> Tensor:
        """Return where pixels have a class."""
        return (gt != self.ignore_index) & ~gt.isnan()

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean cross-entropy of the labelled pixels."""
        known = self.labelled(gt)
        labels = torch.where(known, gt, self.ignore_index).long()
        total = F.cross_entropy(pred, labels, ignore_index=self.ignore_index, reduction="sum")
        return total / known.sum().clamp(min=1)


class DepthLoss(AbsLoss):
    """Mean absolute error of depths ``(batch, 1, h, w)`` over the pixels whose true depth is neither 0 nor NaN.

    A batch without any such pixel gives 0.
    """

    def labelled(self, gt: Tensor) -> Tensor:
        """Return which pixels have a depth, ``(batch, 1, h, w)``."""
        return present(gt.sum(1, keepdim=True))

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``|pred - gt|`` over the pixels with a depth."""
        return mean_known((pred - gt).abs(), self.labelled(gt))


class NormalLoss(AbsLoss):
    """One minus the cosine of the angle to true unit normals ``(batch, 3, h, w)``, averaged; 0 without any normal.

    Pixels whose true components sum to 0 do not count, as in LibMTL: that is how a missing normal is stored; nor do
    those with a NaN. The prediction needs no unit length.
    """

    def labelled(self, gt: Tensor) -> Tensor:
        """Return which pixels have a normal, ``(batch, h, w)``."""
        return present(gt.sum(1))

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        """Return the mean of ``1 - <pred, gt> / |pred|`` over the pixels with a normal."""
        valid = self.labelled(gt)
        cosine = (F.normalize(pred, dim=1) * torch.where(valid.unsqueeze(1), gt, 0)).sum(1)
        return mean_known(1 - cosine, valid)


def present(values: Tensor) -> Tensor:
    """Return which sums over the channels of a map are those of a pixel with a label."""
    return (values != 0) & ~values.isnan()
