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
from fastmtl.support.shapes import lined_up, same_but_ones

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["TorchMetric"]


# Predictions are held back up to so many numbers while they may be logits or probabilities.
_HELD = 2**24


class TorchMetric(AbsMetric):
    """Any metric of torchmetrics as a metric of a task.

    A metric sees labelled entries only: a trainer takes out what the task's loss calls missing, and without one NaN is
    taken out. Where rows have some of their labels only, a metric with an ``ignore_index`` gets that for the missing
    ones; others get the labelled entries as one dimension, but for those with a score for each column, which would no
    longer know the columns and are refused. Dimensions of 1 that only predictions or labels have are left out.

    Metrics of ``torchmetrics.classification`` get whole numbers in floating point as integers. They take a batch for
    logits if one of the predictions is not between 0 and 1; here one such batch tells it of all, so that scores do not
    depend on the batch size.

    Most of them wait for a GPU in every update (they count with ``torch.bincount``), which the metrics of this module
    do not. With several processes torchmetrics itself brings their counts together.

    Args:
        *metrics: Metrics of torchmetrics, together with one score for each metric name of the task: those of several
            outputs, as of ``MeanSquaredError(num_outputs=2)`` and a ``MetricCollection``, have several.

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
        """Hand one batch to every metric, without the labels that are NaN.

        Raises:
            UsageError: A metric does not take predictions or labels like these.
        """
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
        """Hand every metric what is labelled of a batch.

        Raises:
            UsageError: A metric does not take predictions or labels like these.
        """
        pred, gt = _alike(pred, gt)
        if gt.numel() == known.numel():
            known = known.reshape(gt.shape)
        for fed in self._fed:
            fed.update(*_part(fed.metric, pred, gt, known))

    def score_fun(self) -> list[float]:
        """Return the scores of all metrics: one, or one for each output or name, in order.

        Raises:
            UsageError: A metric cannot be computed of what it has seen.
        """
        return [score for fed in self._fed for score in fed.scores()]

    def reinit(self) -> None:
        """Forget all batches."""
        super().reinit()
        for fed in self._fed:
            fed.reset()

    def sync(self, peers: Group) -> None:
        """Agree with the other processes on whether predictions are logits, and let scores be of all of them."""
        super().sync(peers)
        for fed in self._fed:
            fed.are_logits = any(peers.all_gather_object(fed.are_logits))
            fed.peers = peers


class _Fed:
    """A metric, and what is held back from it until it is known whether predictions are logits."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.peers: Group | None = None
        self.are_logits = False
        self._are_probabilities = False
        self._held: list[tuple[Tensor, Tree]] = []
        self._numbers = 0

    def update(self, pred: Tree, gt: Tree) -> None:
        if not isinstance(pred, Tensor) or not pred.is_floating_point() or not _any_of(self.metric, _is_of_classes):
            self._feed(pred, gt)
            return
        if not self.are_logits and bool(((pred < 0) | (pred > 1)).any()):
            if self._are_probabilities:
                raise UsageError(
                    f"{type(self.metric).__name__} got probabilities, all predictions being between 0 and 1, but now "
                    "others: let process_preds return probabilities always."
                )
            self.are_logits = True
        self._held.append((pred.detach(), gt))
        self._numbers += pred.numel()
        self._are_probabilities = not self.are_logits and self._numbers > _HELD
        if self.are_logits or self._are_probabilities:
            self._let_go()

    def scores(self) -> list[float]:
        self._let_go()
        peers, self.peers = self.peers, None
        with (
            warnings.catch_warnings(),
            _in_a_sentence(self.metric, "cannot be computed of the labels that there were"),
            _gathered_by(self.metric, peers),
        ):
            # With several processes, where this one had no labels.
            warnings.filterwarnings("ignore", message=r".*was called before the ``update``")
            return _numbers(self.metric.compute())

    def reset(self) -> None:
        self._held.clear()
        self._numbers, self._are_probabilities = 0, False
        self.metric.reset()

    def _let_go(self) -> None:
        for pred, gt in self._held:
            self._feed(_probabilities(self.metric, pred, gt) if self.are_logits else pred, gt)
        self._held.clear()

    def _feed(self, pred: Tree, gt: Tree) -> None:
        if isinstance(gt, Tensor) and gt.is_floating_point() and _any_of(self.metric, _is_of_classes):
            # Labels that may be missing come as real numbers.
            whole = gt.long()
            gt = whole if bool((whole == gt).all()) else gt
        elif isinstance(gt, Tensor) and gt.dtype == torch.bool and not _any_of(self.metric, _is_of_classes):
            # Torch has no difference of booleans.
            gt = gt.to(pred.dtype) if isinstance(pred, Tensor) and pred.is_floating_point() else gt.long()
        tensors = [values for values in (pred, gt) if isinstance(values, Tensor)]
        shapes = " and ".join(str(tuple(values.shape)) for values in tensors)
        with _in_a_sentence(self.metric, f"does not take predictions and labels of shapes {shapes}"):
            metric = self.metric.to(tensors[0].device) if tensors else self.metric
            metric.update(pred, gt)


def _numbers(score: Any) -> list[float]:
    """Return what a metric computes as numbers, those of a container one after the other."""
    if isinstance(score, Mapping):
        score = list(score.values())
    if isinstance(score, list | tuple):
        return [number for part in score for number in _numbers(part)]
    return [float(number) for number in torch.as_tensor(score).flatten().tolist()]


def _probabilities(metric: Metric, pred: Tensor, gt: Tree) -> Tensor:
    """Return the probabilities that a metric of torchmetrics makes of logits."""
    names = {type(part).__name__ for part in metric.modules()}
    if any(name.startswith("Multiclass") for name in names):
        return pred.softmax(1) if isinstance(gt, Tensor) and pred.dim() == gt.dim() + 1 else pred
    return pred.sigmoid() if any(name.startswith(("Binary", "Multilabel")) for name in names) else pred


def _part(metric: Metric, pred: Tree, gt: Tensor, known: Tensor) -> tuple[Tree, Tensor]:
    """Return what is labelled of a batch in a form that suits a metric."""
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
            f"{type(metric).__name__} scores each row as a whole, but rows of labels of shape {tuple(gt.shape)} have "
            "some of their labels only: give it an ignore_index, if it has one, or write a metric, an AbsMetric."
        )
    if _any_of(metric, _has_columns):
        raise UsageError(
            f"{type(metric).__name__} scores each column by itself, but rows of labels of shape {tuple(gt.shape)} have "
            "some of their labels only: give it an ignore_index, or use a MultioutputWrapper, which leaves out NaN."
        )
    return labelled_part(pred, gt, known)


def _alike(pred: Tree, gt: Tree) -> tuple[Tree, Tree]:
    """Return predictions and labels without dimensions of 1 that only one of them has."""
    if not (isinstance(pred, Tensor) and isinstance(gt, Tensor)) or pred.shape == gt.shape:
        return pred, gt
    if same_but_ones(pred, gt):
        return (pred.reshape(gt.shape), gt) if pred.dim() > gt.dim() else (pred, gt.reshape(pred.shape))
    if pred.dim() == gt.dim() > 1 and gt.shape[1] == 1 and gt.shape[2:] == pred.shape[2:] and len(gt) == len(pred):
        return pred, gt.squeeze(1)
    return pred, gt


def _any_of(metric: Metric, has: Any) -> bool:
    """Return whether a metric, or one that it wraps, has a property."""
    return any(has(part) for part in metric.modules())


def _is_of_classes(metric: Any) -> bool:
    return type(metric).__module__.startswith("torchmetrics.classification")


def _is_of_rows(metric: Any) -> bool:
    """Return whether a metric needs whole rows, be it of labels, pixels, samples in time or points."""
    name, module = type(metric).__name__, type(metric).__module__
    return name.endswith(("ExactMatch", "CosineSimilarity")) or module.startswith(
        ("torchmetrics.segmentation", "torchmetrics.audio", "torchmetrics.shape")
    )


def _has_columns(metric: Any) -> bool:
    by_column = getattr(metric, "num_outputs", 1) != 1 or getattr(metric, "multidim_average", "") == "samplewise"
    return by_column or hasattr(metric, "num_labels") or hasattr(metric, "multioutput")


@contextmanager
def _gathered_by(metric: Metric, peers: Group | None) -> Iterator[None]:
    """Let the states of several processes be gathered by their group.

    Torchmetrics takes states for tensors of one dtype, which those of a process without any label are not.
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
def _in_a_sentence(metric: Metric, what: str) -> Iterator[None]:
    """Say what torchmetrics refuses in a sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as cause:
        lines: Sequence[str] = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UsageError(f"{type(metric).__name__} of torchmetrics {what}: {lines[0]}") from cause
