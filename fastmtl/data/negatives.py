"""Sampling of negatives: all rows with a positive label of a task, and some of the others, anew in each epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fastmtl.data.clicks import ClickRows
from fastmtl.data.columns import Columns
from fastmtl.data.tensors import Tensors
from fastmtl.errors import UsageError
from fastmtl.support.names import resolve_name

__all__ = ["NegativeSampler", "Negatives", "labels_of", "unsampled"]

# Rows that are fetched at a time where labels are not columns.
_CHUNK = 2**16


@dataclass(frozen=True, slots=True)
class Negatives:
    """How many negatives of a task come with each of its positives.

    Attributes:
        task: The task.
        ratio: Negatives of an epoch over positives, above 0.
    """

    task: str
    ratio: float

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Negatives | None:
        """Return those of ``{task: ratio}``; None of nothing.

        Raises:
            UsageError: Several tasks, or a ratio that is no finite number above 0.
        """
        if not given:
            return None
        if len(given) > 1:
            raise UsageError(f"negatives are those of one task, such as click=4, got {', '.join(map(str, given))}.")
        ((task, ratio),) = given.items()
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
            raise UsageError(f"negatives of {task} must be a finite number above 0 for each positive, got {ratio!r}.")
        return cls(str(task), float(ratio))


class NegativeSampler(Sampler[int]):
    """Rows of an epoch in random order: each positive once, and negatives drawn anew without replacement.

    With P positives and ratio r an epoch has ``P + floor(r P + 1/2)`` rows. As a loader's own sampler it goes into
    several processes by ``fastmtl.distributed.shard``, and a resumed run draws the same rows.

    Args:
        labels: (n,) or (n, 1) labels, 1 for a positive and 0 for a negative.
        ratio: Negatives of an epoch over positives.
        generator: What the rows are drawn by.

    Attributes:
        rate: The share w of the negatives that an epoch has, for `unsampled`.

    Raises:
        UsageError: Labels that are neither 0 nor 1, no positive, or fewer negatives than the ratio asks for.

    Example::

        generator = torch.Generator().manual_seed(0)
        sampler = NegativeSampler(rows.labels["click"], ratio=4, generator=generator)
        loader = batch_loader(rows, 256, sampler=sampler)
    """

    def __init__(self, labels: Tensor, ratio: float, generator: torch.Generator) -> None:
        if labels.dim() > 2 or labels[:1].numel() > 1:
            raise UsageError(f"Negatives are of one label for each row, got labels of shape {tuple(labels.shape)}.")
        flat = labels.reshape(-1)
        self.positives, self.negatives = (flat == 1).nonzero().flatten(), (flat == 0).nonzero().flatten()
        others = len(flat) - len(self.positives) - len(self.negatives)
        if others:
            raise UsageError(f"Negatives need a label of 0 or 1 in every row, and {others} rows have none.")
        if not len(self.positives):
            raise UsageError(f"Negatives are drawn for each positive, of which the {len(flat)} rows have none.")
        self.drawn = math.floor(ratio * len(self.positives) + 0.5)
        if not 0 < self.drawn <= len(self.negatives):
            most = len(self.negatives) / len(self.positives)
            raise UsageError(
                f"There are {len(self.positives)} positives and {len(self.negatives)} negatives, so the ratio of "
                f"negatives must be above 0 and at most {most:.6g}, got {ratio:g}."
            )
        self.generator = generator

    @property
    def rate(self) -> float:
        """The share of the negatives that an epoch has."""
        return self.drawn / len(self.negatives)

    def __len__(self) -> int:
        return len(self.positives) + self.drawn

    def __iter__(self) -> Iterator[int]:
        drawn = torch.randperm(len(self.negatives), generator=self.generator)[: self.drawn]
        rows = torch.cat([self.positives, self.negatives[drawn]])
        yield from rows[torch.randperm(len(rows), generator=self.generator)].tolist()


def labels_of(rows: Any, task: str) -> Tensor:
    """Return the labels of a task in all rows of a table.

    Raises:
        UsageError: It has no such task, or the rows are no table.
    """
    if isinstance(rows, Columns | Tensors) and isinstance(rows.labels, Mapping):
        return resolve_name(task, rows.labels, "task of negatives")
    if not isinstance(rows, ClickRows):
        raise UsageError(
            f"negatives are for tables with labels by task, such as clicks, not for a {type(rows).__name__}."
        )
    parts: list[Tensor] = []
    for start in range(0, len(rows), _CHUNK):
        _, of_chunk = rows.__getitems__(range(start, min(start + _CHUNK, len(rows))))
        parts.append(resolve_name(task, of_chunk, "task of negatives"))
    return torch.cat(parts)


def unsampled(probabilities: Tensor, rate: float, of_sampled: Tensor | None = None) -> Tensor:
    """Return probabilities of all rows from those of a model that was trained on a share of the negatives.

    A model of rows of which all positives but only a share w of the negatives of a task are kept learns
    ``p' = p / (p + w (1 - p))``. So ``p = p' / (p' + (1 - p') / w) = w p' / (1 - (1 - w) p')``. Of another task, whose
    positives are all positives of the sampled one, as conversions are clicks, it learns ``q' = q / (p + w (1 - p))``,
    so that ``q = w q' / (1 - (1 - w) p')``. Those of a conversion given a click are right as they are; those of a task
    with positives elsewhere cannot be known.

    Args:
        probabilities: The model's q' of a task, of any shape.
        rate: w, above 0 and at most 1, as of ``NegativeSampler.rate``.
        of_sampled: The model's p' of the sampled task, of the same shape; None where the task is the sampled one.

    Raises:
        UsageError: The rate is out of range, or the shapes differ.
    """
    if not 0 < rate <= 1:
        raise UsageError(f"rate must be above 0 and at most 1, got {rate}.")
    sampled = probabilities if of_sampled is None else of_sampled
    if sampled.shape != probabilities.shape:
        raise UsageError(
            f"The probabilities of both tasks must have one shape, got {tuple(probabilities.shape)} and "
            f"{tuple(sampled.shape)}."
        )
    return rate * probabilities / (1 - (1 - rate) * sampled)
