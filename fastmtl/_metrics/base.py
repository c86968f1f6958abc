"""The base of all metrics, and of those that keep sums on the device."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmtl._metrics.missing import labelled_part
from fastmtl.errors import UsageError
from fastmtl.support.classes import overrides
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.kinds import Tree
from fastmtl.support.running import Group

__all__ = ["AbsMetric", "Sums", "ratio", "totals"]


class AbsMetric:
    """Base of all metrics: override ``update_fun`` and ``score_fun``, and ``reinit`` if there is further state.

    The trainer passes only labelled entries to ``update_fun``: it removes the rows that the task's loss calls missing
    or, where a row has only some of its labels, selects the labelled entries, as ``(n,)`` labels. Batches without any
    label are left out. Labels in lists and dictionaries are passed unchanged.

    Attributes:
        record: For subclasses: data of each batch.
        bs: For subclasses: the batch sizes.
        missing: A label that ``update_fun`` skips, set in the class that defines it. Missing labels are then replaced
            by it, which is faster than removing them; None if there is no such label.
        adds_rows: Whether several batches may be passed to ``update_fun`` as one of all their rows, set like
            ``missing``.
    """

    missing: float | None = None
    adds_rows: bool = False

    def __init__(self) -> None:
        self.record: list[Any] = []
        self.bs: list[Any] = []

    def __init_subclass__(cls, **options: Any) -> None:
        """Reset ``missing`` and ``adds_rows`` of a base class where ``update_fun`` is overridden."""
        super().__init_subclass__(**options)
        if overrides(cls, "update_fun", "missing"):
            cls.missing = None
        if overrides(cls, "update_fun", "adds_rows") or overrides(cls, "_add", "adds_rows"):
            cls.adds_rows = False

    def update_fun(self, pred: Tree, gt: Tree) -> None:
        """Add one batch of predictions and labels, both ``(batch, ...)``; called without gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define update_fun(pred, gt)")

    def update_known(self, pred: Tree, gt: Tensor, known: Tensor) -> None:
        """Add the labelled part, where ``known``, of a batch in which some labels are missing."""
        self.update_fun(*labelled_part(pred, gt, known))

    def score_fun(self) -> list[float]:
        """Return the scores of all batches since ``reinit``, one per metric name of the task."""
        raise NotImplementedError(f"{type(self).__name__} must define score_fun()")

    def reinit(self) -> None:
        """Forget all batches."""
        self.record = []
        self.bs = []

    def sync(self, peers: Group) -> None:
        """Merge the state of all processes before a score; override it if there is further state.

        ``record`` and ``bs`` become the concatenated lists of all processes, on the CPU.
        """
        lists = self.record, self.bs
        own = [[value.cpu() if isinstance(value, Tensor) else value for value in values] for values in lists]
        of_processes = peers.all_gather_object(own)
        self.record, self.bs = ([value for each in of_processes for value in each[k]] for k in (0, 1))


class Sums(AbsMetric):
    """Keeps named sums on the device of the predictions: by default a sum of scores and a count."""

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
        """Return the mean as a list of one, NaN without labels; waits for the device.

        Raises:
            UsageError: There was no batch.
        """
        return [ratio(*self._read().tolist())]

    def reinit(self) -> None:
        """Forget all batches."""
        super().reinit()
        self._kept = dict.fromkeys(self.kept)

    def sync(self, peers: Group) -> None:
        """Add the sums of the other processes."""
        super().sync(peers)
        self._kept = {name: peers.all_reduce_optional(value) for name, value in self._kept.items()}


def totals(*values: Tensor) -> Tensor:
    """Return a vector of the sums of several tensors."""
    return torch.stack([value.detach().to(wide_dtype(value.device)).sum() for value in values])


def ratio(part: float, whole: float) -> float:
    """Return ``part / whole``, NaN if ``whole`` is 0."""
    return part / whole if whole else math.nan
