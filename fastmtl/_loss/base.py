"""The base of all losses, and means over the labelled entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.support.classes import overrides
from fastmtl.support.dtypes import HALF_TYPES, wide_dtype
from fastmtl.support.running import Group, RunningMean

__all__ = [
    "AbsLoss",
    "Complete",
    "LossState",
    "PerClass",
    "added",
    "differs",
    "is_complete",
    "mean_known",
    "over",
    "present",
    "updates_itself",
]

# The losses, batch sizes and running sums of an `AbsLoss`.
LossState = tuple[list[float], list[int], tuple[Tensor | None, float | Tensor]]


# The labels that are known to have no missing entry, by identity: their version, and what would mark a missing one.
_complete: dict[int, tuple[int, int | None]] = {}


class Complete:
    """A block in which losses know that some labels have no missing entry, so that they need not look.

    Args:
        labels: Pairs of a loss and of labels that are all there by its ``labelled``.
    """

    def __init__(self, labels: Iterable[tuple[AbsLoss, object]]) -> None:
        self._labels = {id(gt): (_version(gt), loss.ignore_index) for loss, gt in labels if isinstance(gt, Tensor)}
        self._before: dict[int, tuple[int, int | None]] = {}

    def __enter__(self) -> None:
        global _complete
        self._before, _complete = _complete, self._labels

    def __exit__(self, *_: object) -> None:
        global _complete
        _complete = self._before


def is_complete(loss: AbsLoss, gt: object) -> bool:
    """Return whether labels are known to have no entry that a loss calls missing; never while compiling."""
    if torch.compiler.is_compiling() or not _complete or not isinstance(gt, Tensor) or not loss.marks_entries:
        return False
    version, marker = _complete.get(id(gt), (None, None))
    # Changed in place, they may have one.
    return version == _version(gt) and (gt.is_floating_point() or loss.ignore_index in (None, marker))


def _version(gt: Tensor) -> int:
    return 0 if gt.is_inference() else gt._version


class AbsLoss:
    """Base of all losses: subclasses override ``compute_loss``.

    ``compute_loss`` is pure and may run inside ``torch.compile``; ``accumulate`` is called outside of it, once per
    batch. The losses of :mod:`fastmtl.loss` average over the labelled entries (:meth:`labelled`); a batch without any
    gives 0 with zero gradients. Losses that divide by something else, such as a sum of weights, override
    :meth:`divisor`.

    Attributes:
        ignore_index: The integer that marks a missing label; None where integers are values and never missing. Missing
            floating-point labels are NaN.
        record: The losses of the batches, as floats, for subclasses that override LibMTL's ``_update_loss`` or
            ``_average_loss``, which wait for the device in every batch; empty otherwise.
        bs: The batch sizes that belong to ``record``.
        marks_entries: Whether labels without NaN and ``ignore_index`` are all there; False where a subclass overrides
            ``labelled`` and does not say so.
    """

    ignore_index: int | None = -100
    marks_entries: ClassVar[bool] = True

    _running: RunningMean

    def __init_subclass__(cls, **options: Any) -> None:
        """Reset ``marks_entries`` of a base class where ``labelled`` is overridden."""
        super().__init_subclass__(**options)
        if overrides(cls, "labelled", "marks_entries"):
            cls.marks_entries = False

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Create the sums, also for classes written for LibMTL that do not call ``super().__init__()``."""
        loss = super().__new__(cls)
        loss._running = RunningMean()
        loss.record, loss.bs = [], []
        return loss

    def __init__(self) -> None:
        self.record: list[float] = []
        self.bs: list[int] = []

    def compute_loss(self, pred: Any, gt: Any) -> Tensor:
        """Return the mean loss of one batch, a scalar, from predictions and labels, both ``(batch, ...)``."""
        raise NotImplementedError(f"{type(self).__name__} must define compute_loss(pred, gt)")

    def labelled(self, gt: Tensor) -> Tensor:
        """Return booleans that say where labels are present.

        To be overridden where missing labels are marked by anything but NaN or ``ignore_index``. The booleans have the
        labels' shape, or lack the channels, dimension 1 or the last one, or are ``(batch,)``. If both dimensions could
        be the missing one, as of keypoints ``(batch, 3, 3)``, keep it as a 1, which metrics need. Overrides get the
        labels as the loader returns them, lists and dictionaries too.
        """
        if gt.is_floating_point():
            return ~gt.isnan()
        return differs(gt, self.ignore_index)

    def divisor(self, gt: Tensor) -> int | Tensor:
        """Return the scalar by which ``compute_loss`` divides the sum over a batch: the number of labelled entries.

        Losses of several batches or processes are averaged with these weights, so that the result is that of one batch
        of all rows. A weighted mean returns the sum of its weights.
        """
        return self.labelled(gt).sum()

    def divisors(self, gt: Tensor, count: int) -> Tensor:
        """Return the :meth:`divisor` (count,) of each of several batches of one size, one after the other in ``gt``."""
        if type(self).divisor is AbsLoss.divisor:
            return self.labelled(gt).reshape(count, -1).sum(1)
        return torch.stack([torch.as_tensor(self.divisor(batch)) for batch in gt.chunk(count)])

    def accumulate(self, loss: Tensor, batch_size: int | Tensor) -> None:
        """Add the loss of one batch to the running mean, weighted by its ``divisor``; never waits for the device.

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
        if type(self)._average_loss is not AbsLoss._average_loss and type(self)._update_loss is AbsLoss._update_loss:
            # As in LibMTL, whose _average_loss reads the record.
            self.record.append(loss.item())
            self.bs.append(len(pred))
        self.accumulate(loss, self.divisor(gt))
        return loss

    def _average_loss(self) -> float:
        if self.record:
            return sum(loss * size for loss, size in zip(self.record, self.bs, strict=True)) / sum(self.bs)
        if self._running.empty:
            raise UsageError(f"{type(self).__name__} has no batch to average: is the data loader empty?")
        return self._running.value()

    def is_unlabelled(self) -> bool:
        """Return whether no batch since the last ``_reinit`` had a label; waits for the device."""
        return not self.record and self._running.weightless

    def _reinit(self) -> None:
        self.record = []
        self.bs = []
        self._running.reset()

    def _state(self) -> LossState:
        """Return the accumulated losses, for :meth:`_restore`."""
        return list(self.record), list(self.bs), self._running.state()

    def _restore(self, state: LossState) -> None:
        self.record, self.bs, running = state
        self._running.restore(running)

    def sync(self, peers: Group) -> None:
        """Add the losses that the other processes have accumulated."""
        self._restore(added(peers.all_gather_object((self.record, self.bs, self._running.on_host()))))


def added(states: Sequence[LossState]) -> LossState:
    """Return the state of a loss that has accumulated what several have."""
    if len(states) == 1:
        return states[0]
    totals = [total for _, _, (total, _) in states if total is not None]
    total = torch.stack(totals).sum() if totals else None
    weight = sum(weight for _, _, (_, weight) in states)
    record = [loss for losses, _, _ in states for loss in losses]
    return record, [size for _, sizes, _ in states for size in sizes], (total, weight)


def updates_itself(loss: AbsLoss) -> bool:
    """Return whether a loss overrides LibMTL's methods that record or average the losses of batches."""
    return type(loss)._update_loss is not AbsLoss._update_loss or type(loss)._average_loss is not AbsLoss._average_loss


class PerClass:
    """Finite numbers of at least 0, one per class, cached on the device of their last use; ``name`` is for errors."""

    def __init__(self, values: Any, name: str) -> None:
        self.values = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
        self.name = name
        if self.values.dim() != 1 or not self.values.isfinite().all() or (self.values < 0).any():
            raise UsageError(f"{name} must be a vector of finite numbers of at least 0, one per class, got {values!r}.")
        if not (self.values > 0).any():
            raise UsageError(f"{name} must be above 0 for some class, got {values!r}.")
        # The same numbers on the device of the last predictions.
        self._cached = self.values

    def of(self, pred: Tensor) -> Tensor:
        """Return the numbers on the device of logits ``(batch, classes, ...)``, in their dtype.

        Raises:
            UsageError: Their number is not the number of classes.
        """
        if pred.dim() < 2 or pred.shape[1] != len(self.values):
            raise UsageError(
                f"{self.name} has {len(self.values)} numbers, one per class, but predictions are of shape "
                f"{tuple(pred.shape)}."
            )
        return self.on(pred.device).to(pred.dtype)

    def on(self, device: torch.device) -> Tensor:
        """Return the numbers on a device; copies them there without waiting, if they are on another."""
        if self._cached.device != device:
            self._cached = self.values.to(wide_dtype(device)).to(device, non_blocking=True)
        return self._cached


def over(total: Tensor, divisor: Tensor) -> Tensor:
    """Return a sum over its divisor; 0 where the divisor is 0, as the sum is 0 too."""
    return total / torch.where(divisor == 0, 1, divisor)


def differs(gt: Tensor, label: int | None) -> Tensor:
    """Return where labels differ from ``label``, which need not fit into their dtype; everywhere for None."""
    dtype = gt.dtype
    if label is not None and not gt.is_floating_point() and dtype != torch.bool:
        # Torch would wrap a label out of range around.
        label = label if torch.iinfo(dtype).min <= label <= torch.iinfo(dtype).max else None
    return torch.ones_like(gt, dtype=torch.bool) if label is None else gt != label


def mean_known(values: Tensor, known: Tensor) -> Tensor:
    """Return the mean of the values where ``known``, 0 if none is."""
    known = known.expand_as(values)
    # A float16 sum overflows at 65504.
    dtype = torch.float32 if values.dtype in HALF_TYPES else values.dtype
    return (torch.where(known, values, 0).sum(dtype=dtype) / known.sum().clamp(min=1)).to(values.dtype)


def present(values: Tensor) -> Tensor:
    """Return which pixels have a label, from the sums of their channels."""
    return (values != 0) & ~values.isnan()
