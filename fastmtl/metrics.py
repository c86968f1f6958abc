"""Metrics of tasks, accumulated on the device and read once per epoch.

Example::

    class Recall(AbsMetric):
        def update_fun(self, pred, gt):
            self.record.append(((pred > 0) & gt).sum())
            self.bs.append(gt.sum())

        def score_fun(self):
            return [(sum(self.record) / sum(self.bs)).item()]
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.loss import mean_known, present
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.running import Group

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = [
    "AbsMetric",
    "AccMetric",
    "DepthMetric",
    "F1Metric",
    "L1Metric",
    "NormalMetric",
    "SegMetric",
    "TorchMetric",
]

_FORMERLY = {
    "acc_update_fun": "AccMetric",
    "acc_score_fun": "AccMetric",
    "L1_update_fun": "L1Metric",
    "L1_score_fun": "L1Metric",
}


def __getattr__(name: str) -> NoReturn:
    if name in _FORMERLY:
        raise UsageError(
            f"{name} is now a method of the class {_FORMERLY[name]}: write {{'metrics_fn': {_FORMERLY[name]}()}} in "
            f"place of the list of two functions."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AbsMetric:
    """Base of all metrics: override ``update_fun`` and ``score_fun``, and ``reinit`` if there is further state.

    Attributes:
        record: For subclasses: whatever they keep of each batch.
        bs: For subclasses: the batch sizes.
    """

    def __init__(self) -> None:
        self.record: list[Any] = []
        self.bs: list[Any] = []

    def update_fun(self, pred: Any, gt: Any) -> None:
        """Take in one batch of predictions and labels, both ``(batch, ...)``; called without gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define update_fun(pred, gt)")

    def score_fun(self) -> list[float]:
        """Return the scores of all batches since ``reinit``, one per metric name of the task."""
        raise NotImplementedError(f"{type(self).__name__} must define score_fun()")

    def reinit(self) -> None:
        """Forget all batches."""
        self.record = []
        self.bs = []

    def sync(self, peers: Group) -> None:
        """Take in what the other processes know, before a score; override it if there is further state.

        ``record`` and ``bs`` become the lists of all processes, one after the other, on the CPU.
        """
        for name in ("record", "bs"):
            own = [value.cpu() if isinstance(value, Tensor) else value for value in getattr(self, name)]
            setattr(self, name, [value for each in peers.gather(own) for value in each])


class _Sums(AbsMetric):
    """Keeps sums, by name, where the predictions are; a sum of scores and a count, unless a metric has its own."""

    kept: ClassVar[tuple[str, ...]] = ("sums",)

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, Tensor | None] = dict.fromkeys(self.kept)

    def _add(self, sums: Tensor) -> None:
        before = self._kept["sums"]
        self._kept["sums"] = sums if before is None else before + sums

    def _read(self) -> Tensor:
        """Return the sums on the CPU; waits for the device."""
        sums = self._kept["sums"]
        if sums is None:
            raise UsageError(f"{type(self).__name__} has no batch to score: is the data loader empty?")
        return sums.cpu()

    def score_fun(self) -> list[float]:
        """Return the mean as a list of one; waits for the device.

        Raises:
            UsageError: There was no batch.
        """
        return [_ratio(*self._read().tolist())]

    def reinit(self) -> None:
        """Forget all batches."""
        super().reinit()
        self._kept = dict.fromkeys(self.kept)

    def sync(self, peers: Group) -> None:
        """Take in what the other processes know."""
        super().sync(peers)
        self._kept = {name: peers.total(each) for name, each in self._kept.items()}


def _totals(*values: Tensor) -> Tensor:
    """Return the sum of each of several tensors, as a vector."""
    return torch.stack([each.detach().to(wide_dtype(each.device)).sum() for each in values])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


class AccMetric(_Sums):
    """Accuracy: the share of labels ``gt`` (any shape) equal to the arg max of ``pred`` ``(*gt.shape, classes)``.

    Args:
        ignore_index: Label of entries that do not count.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Count the right predictions of one batch."""
        if gt.numel():
            # The mean of a batch times its count is not exact in float32, the count of right ones is.
            self._add(_totals(pred.argmax(-1).eq(gt).sum(), (gt != self.ignore_index).sum()))


class L1Metric(_Sums):
    """Mean absolute error of the labels that are not NaN, each batch's mean weighted by its labelled rows."""

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Take in the mean absolute error of one batch."""
        known = ~gt.isnan()
        mean = mean_known((pred - gt).abs(), known)
        rows = known.reshape(len(known), -1).any(1).sum()
        self._add(_totals(mean.to(wide_dtype(mean.device)) * rows, rows))


class _Confusion(_Sums):
    def __init__(self, num_classes: int = 13) -> None:
        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes must be at least 2, got {num_classes}.")
        self.num_classes = num_classes

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Count logits ``(batch, classes, ...)`` against labels ``(batch, ...)``; labels outside 0 .. C-1 are skipped.

        Raises:
            UsageError: ``pred`` does not have ``num_classes`` channels.
        """
        count = self.num_classes
        if pred.shape[1] != count:
            raise UsageError(
                f"{type(self).__name__} is for {count} classes, so pred must be (batch, {count}, ...), "
                f"got shape {tuple(pred.shape)}."
            )
        labels, chosen = torch.where(gt.isnan(), -1, gt).long().flatten(), pred.argmax(1).flatten()
        known = (labels >= 0) & (labels < count)
        # One bin more for what is skipped: selecting the known labels would wait for their number.
        bins = torch.where(known, count * labels + chosen, count * count)
        self._add(bins.new_zeros(count * count + 1).scatter_add_(0, bins, torch.ones_like(bins)))

    def confusion(self) -> Tensor:
        """Return how often class i (row) was taken for class j, ``(C, C)`` float64; waits for the device."""
        return self._read()[:-1].reshape(self.num_classes, self.num_classes).double()

    def accuracy(self) -> float:
        """Return the share of labels that were predicted, NaN without labels; waits for the device."""
        counts = self.confusion()
        return _ratio(counts.trace().item(), counts.sum().item())


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
        right, both = counts.diagonal(), counts.sum(0) + counts.sum(1)
        if self.average == "micro":
            return [_ratio(2 * right.sum().item(), both.sum().item())]
        scores = 2 * right / both
        return [scores[1].nan_to_num().item() if self.average == "binary" else scores.nanmean().item()]


class DepthMetric(_Sums):
    """Absolute and relative error of depths ``(batch, 1, h, w)``, ``[abs_err, rel_err]``.

    Means of ``|pred - gt|`` and ``|pred - gt| / gt`` over all pixels whose true depth is neither 0 nor NaN.
    """

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Take in one batch."""
        valid = present(gt.sum(1, keepdim=True))
        error = torch.where(valid, (pred - gt).abs(), 0)
        relative = error / torch.where(valid, gt, 1)
        self._add(_totals(error, relative, valid))

    def score_fun(self) -> list[float]:
        """Return ``[abs_err, rel_err]``, NaN without a pixel of known depth."""
        absolute, relative, count = self._read().tolist()
        return [_ratio(absolute, count), _ratio(relative, count)]


class NormalMetric(_Sums):
    """Angle between predicted and true normals ``(batch, 3, h, w)``: mean and median in degrees, shares below a limit.

    The scores are ``[mean, median, <11.25, <22.5, <30]`` over all pixels whose true components sum neither to 0 nor to
    NaN (a missing normal). The median is that of angles counted in ``BINS`` steps of 180 degrees, exact to 1e-4,
    so that a pass over a data set needs 8 MB and not all of its pixels.
    """

    BINS = 2**20
    LIMITS = (11.25, 22.5, 30.0)
    kept = ("sums", "histogram")

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Take in one batch; the true normals have unit length."""
        known = present(gt.sum(1))
        valid = known.flatten()
        cosine = (F.normalize(pred, dim=1) * torch.where(known.unsqueeze(1), gt, 0)).sum(1).clamp(-1, 1).flatten()
        degrees = torch.where(valid, torch.rad2deg(torch.acos(cosine)), 0)
        self._add(_totals(degrees, *((degrees < limit) & valid for limit in self.LIMITS), valid))
        bins = (degrees * (self.BINS / 180)).long().clamp(0, self.BINS - 1)
        histogram = self._kept["histogram"]
        if histogram is None:
            histogram = self._kept["histogram"] = bins.new_zeros(self.BINS)
        histogram.scatter_add_(0, bins, valid.long())

    def score_fun(self) -> list[float]:
        """Return ``[mean, median, <11.25, <22.5, <30]``, NaN without a normal."""
        total, *below, count = self._read().tolist()
        return [_ratio(total, count), self._median(int(count)), *(_ratio(each, count) for each in below)]

    def _median(self, count: int) -> float:
        histogram = self._kept["histogram"]
        if count == 0 or histogram is None:
            return math.nan
        ranks = torch.tensor([(count + 1) // 2, count // 2 + 1])
        middle = torch.searchsorted(histogram.cpu().cumsum(0), ranks)
        return ((middle.double() + 0.5) * (180 / self.BINS)).mean().item()


class TorchMetric(AbsMetric):
    """Any metric of torchmetrics as a metric of a task.

    Most of them wait for a GPU in every update (they count with ``torch.bincount``), which the metrics of this module
    do not. With several processes torchmetrics itself brings their counts together.

    Args:
        *metrics: Metrics of torchmetrics, one per score of the task.

    Example::

        TorchMetric(torchmetrics.classification.BinaryAUROC())
    """

    def __init__(self, *metrics: Metric) -> None:
        super().__init__()
        if not metrics:
            raise UsageError("TorchMetric needs at least one metric of torchmetrics.")
        self.metrics = metrics

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Hand one batch to every metric."""
        for metric in self.metrics:
            metric.to(pred.device).update(pred, gt)

    def score_fun(self) -> list[float]:
        """Return one score per metric."""
        return [float(metric.compute()) for metric in self.metrics]

    def reinit(self) -> None:
        """Forget all batches."""
        super().reinit()
        for metric in self.metrics:
            metric.reset()
