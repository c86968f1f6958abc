"""Metrics of torchmetrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmtl._metrics.base import AbsMetric
from fastmtl._metrics.missing import has_partial_rows, labelled_part, labelled_rows
from fastmtl.errors import UsageError
from fastmtl.support.kinds import Tree
from fastmtl.support.running import Group
from fastmtl.support.shapes import lined_up, without_extra_ones

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["TorchMetric"]


# Predictions are buffered up to this number of entries while they may be logits or probabilities.
_BUFFERED = 2**24


class TorchMetric(AbsMetric):
    """Any metric of torchmetrics as a metric of a task.

    The metric gets labelled entries only: the trainer removes those that the task's loss calls missing; outside of a
    trainer NaN is removed. Where a row has only some of its labels, a metric with an ``ignore_index`` gets it for the
    missing ones; other metrics get the labelled entries as one dimension, which is refused for those with a score per
    column. Dimensions of 1 that only predictions or labels have are removed.

    Metrics of ``torchmetrics.classification`` get integers in floating point as integers. They take a batch for logits
    if one prediction is not between 0 and 1; here one such batch decides for all, so that scores do not depend on the
    batch size. Most of them wait for a GPU in every update, as they count with ``torch.bincount``; the metrics of this
    package do not. With several processes torchmetrics itself reduces the counts.

    Args:
        *metrics: Metrics of torchmetrics, which in all give one score per metric name of the task: those with several
            outputs, such as ``MeanSquaredError(num_outputs=2)`` or a ``MetricCollection``, give several.

    Example::

        TorchMetric(torchmetrics.classification.BinaryAUROC())
    """

    def __init__(self, *metrics: Metric) -> None:
        super().__init__()
        if not metrics:
            raise UsageError("TorchMetric needs at least one metric of torchmetrics.")
        self.metrics = metrics
        self._fed = [_Fed(metric) for metric in metrics]

    def update_fun(self, pred: Tree, gt: Tree) -> None:
        """Update every metric with one batch, without labels that are NaN. A UsageError if a metric refuses it."""
        if isinstance(gt, Tensor) and gt.is_floating_point() and gt.dim():
            known = ~gt.isnan()
            if not known.all():
                if known.any():
                    self.update_known(pred, gt, known.cpu())
                return
        pred, gt = _alike(pred, gt)
        for fed in self._fed:
            fed.update(pred, gt)

    def update_known(self, pred: Tree, gt: Tensor, known: Tensor) -> None:
        """Update every metric with the labelled part of a batch. A UsageError if a metric refuses it."""
        pred, gt = _alike(pred, gt)
        if gt.numel() == known.numel():
            known = known.reshape(gt.shape)
        for fed in self._fed:
            fed.update(*_part(fed.metric, pred, gt, known))

    def score_fun(self) -> list[float]:
        """Return the scores of all metrics: one, or one for each output or name, in order.

        Raises:
            UsageError: A metric cannot be computed from the labels it got.
        """
        return [score for fed in self._fed for score in fed.scores()]

    def reinit(self) -> None:
        """Forget all batches."""
        super().reinit()
        for fed in self._fed:
            fed.reset()

    def sync(self, peers: Group) -> None:
        """Agree on whether predictions are logits, and compute scores over all processes."""
        super().sync(peers)
        for fed in self._fed:
            fed.are_logits = any(peers.all_gather_object(fed.are_logits))
            fed.peers = peers


class _Fed:
    """A metric and the batches buffered until it is known whether predictions are logits."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.peers: Group | None = None
        self.are_logits = False
        self._are_probabilities = False
        self._buffer: list[tuple[Tensor, Tree]] = []
        self._numbers = 0

    def update(self, pred: Tree, gt: Tree) -> None:
        if not isinstance(pred, Tensor) or not pred.is_floating_point() or not _any_of(self.metric, _is_of_classes):
            self._feed(pred, gt)
            return
        if not self.are_logits and bool(((pred < 0) | (pred > 1)).any()):
            if self._are_probabilities:
                raise UsageError(
                    f"{type(self.metric).__name__} got predictions from 0 to 1, which are probabilities, and now "
                    "others: let process_preds always return probabilities."
                )
            self.are_logits = True
        self._buffer.append((pred.detach(), gt))
        self._numbers += pred.numel()
        self._are_probabilities = not self.are_logits and self._numbers > _BUFFERED
        if self.are_logits or self._are_probabilities:
            self._flush()

    def scores(self) -> list[float]:
        self._flush()
        peers, self.peers = self.peers, None
        with (
            warnings.catch_warnings(),
            _usage_errors(self.metric, "cannot be computed from the labels it got"),
            _gathered_by(self.metric, peers),
        ):
            # This process may have had no labels.
            warnings.filterwarnings("ignore", message=r".*was called before the ``update``")
            return _numbers(self.metric.compute())

    def reset(self) -> None:
        self._buffer.clear()
        self._numbers, self._are_probabilities = 0, False
        self.metric.reset()

    def _flush(self) -> None:
        for pred, gt in self._buffer:
            self._feed(_probabilities(self.metric, pred, gt) if self.are_logits else pred, gt)
        self._buffer.clear()

    def _feed(self, pred: Tree, gt: Tree) -> None:
        if isinstance(gt, Tensor) and gt.is_floating_point() and _any_of(self.metric, _is_of_classes):
            # Labels of which some may be missing are floating point.
            integers = gt.long()
            gt = integers if bool((integers == gt).all()) else gt
        elif isinstance(gt, Tensor) and gt.dtype == torch.bool and not _any_of(self.metric, _is_of_classes):
            # Torch cannot subtract booleans.
            gt = gt.to(pred.dtype) if isinstance(pred, Tensor) and pred.is_floating_point() else gt.long()
        tensors = [values for values in (pred, gt) if isinstance(values, Tensor)]
        shapes = " and ".join(str(tuple(values.shape)) for values in tensors)
        with _usage_errors(self.metric, f"does not take predictions and labels of shapes {shapes}"):
            metric = self.metric.to(tensors[0].device) if tensors else self.metric
            metric.update(pred, gt)


def _numbers(score: Any) -> list[float]:
    """Return the results of a metric as a flat list of numbers."""
    if isinstance(score, Mapping):
        score = list(score.values())
    if isinstance(score, list | tuple):
        return [number for part in score for number in _numbers(part)]
    return [float(number) for number in torch.as_tensor(score).flatten().tolist()]


def _probabilities(metric: Metric, pred: Tensor, gt: Tree) -> Tensor:
    """Return the probabilities that a metric of torchmetrics computes from logits."""
    names = {type(part).__name__ for part in metric.modules()}
    if any(name.startswith("Multiclass") for name in names):
        return pred.softmax(1) if isinstance(gt, Tensor) and pred.dim() == gt.dim() + 1 else pred
    return pred.sigmoid() if any(name.startswith(("Binary", "Multilabel")) for name in names) else pred


def _part(metric: Metric, pred: Tree, gt: Tensor, known: Tensor) -> tuple[Tree, Tensor]:
    """Return the labelled part of a batch in the form that a metric needs."""
    if not has_partial_rows(known):
        return labelled_part(pred, gt, known)
    rows = labelled_rows(pred, known), labelled_rows(gt, known)
    if gt.is_floating_point() and _any_of(metric, lambda part: getattr(part, "remove_nans", False)):
        return rows[0], labelled_rows(torch.where(lined_up(known, gt).to(gt.device), gt, math.nan), known)
    ignored: list[Any] = [getattr(part, "ignore_index", None) for part in metric.modules()]
    ignored = [label for label in ignored if label is not None]
    if ignored and known.shape == gt.shape:
        here = labelled_rows(known, known).to(gt.device, non_blocking=True)
        return rows[0], torch.where(here, rows[1], ignored[0])
    if _any_of(metric, _is_of_rows):
        raise UsageError(
            f"{type(metric).__name__} scores whole rows, but some rows of the labels of shape {tuple(gt.shape)} have "
            "only some of their labels: give it an ignore_index, if it has one, or write an AbsMetric."
        )
    if _any_of(metric, _has_columns):
        raise UsageError(
            f"{type(metric).__name__} scores each column, but some rows of the labels of shape {tuple(gt.shape)} have "
            "only some of their labels: give it an ignore_index, or use a MultioutputWrapper, which leaves out NaN."
        )
    return labelled_part(pred, gt, known)


def _alike(pred: Tree, gt: Tree) -> tuple[Tree, Tree]:
    """Return predictions and labels without dimensions of 1 that only one of them has."""
    if not (isinstance(pred, Tensor) and isinstance(gt, Tensor)) or pred.shape == gt.shape:
        return pred, gt
    if pred.dim() == gt.dim() > 1 and gt.shape[1] == 1 and gt.shape[2:] == pred.shape[2:] and len(gt) == len(pred):
        return pred, gt.squeeze(1)
    return without_extra_ones(pred, gt)


def _any_of(metric: Metric, has: Any) -> bool:
    """Return whether a metric, or one that it wraps, has a property."""
    return any(has(part) for part in metric.modules())


def _is_of_classes(metric: Any) -> bool:
    return type(metric).__module__.startswith("torchmetrics.classification")


def _is_of_rows(metric: Any) -> bool:
    """Return whether a metric scores whole rows, such as images, signals or point clouds."""
    name, module = type(metric).__name__, type(metric).__module__
    return name.endswith(("ExactMatch", "CosineSimilarity")) or module.startswith(
        ("torchmetrics.segmentation", "torchmetrics.audio", "torchmetrics.shape")
    )


def _has_columns(metric: Any) -> bool:
    by_column = getattr(metric, "num_outputs", 1) != 1 or getattr(metric, "multidim_average", "") == "samplewise"
    return by_column or hasattr(metric, "num_labels") or hasattr(metric, "multioutput")


@contextmanager
def _gathered_by(metric: Metric, peers: Group | None) -> Iterator[None]:
    """Gather the states of several processes by their group in the block.

    Torchmetrics would require equal dtypes, but the states of a process without labels may have others.
    """

    def gather(state: Tensor, group: object = None) -> list[Tensor]:
        assert peers is not None
        states = [other.to(state.device) for other in peers.all_gather_object(state.cpu())]
        return [other for other in states if other.numel()] or states[:1]

    parts: list[Any] = [] if peers is None else [part for part in metric.modules() if hasattr(part, "dist_sync_fn")]
    parts = [part for part in parts if part.dist_sync_fn is None]
    for part in parts:
        part.dist_sync_fn = gather
    try:
        yield
    finally:
        for part in parts:
            part.dist_sync_fn = None


@contextmanager
def _usage_errors(metric: Metric, what: str) -> Iterator[None]:
    """Raise a UsageError of one sentence in place of torchmetrics' errors."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as cause:
        lines: Sequence[str] = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UsageError(f"{type(metric).__name__} of torchmetrics {what}: {lines[0]}") from cause
