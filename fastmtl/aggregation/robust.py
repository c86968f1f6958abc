"""Krum and the trimmed mean: gradients of which some may be arbitrary."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.aggregation.base import ColumnAggregator, GramianWeightedAggregator, GramWeighting
from fastmtl.errors import UsageError
from fastmtl.support.settings import Through, at_least

__all__ = ["Krum", "KrumWeighting", "TrimmedMean"]


class KrumWeighting(GramWeighting):
    """Equal weights of the gradients that are closest to their neighbours.

    The score of a gradient is the sum of its distances to the ``T - n_byzantine - 2`` nearest others; the
    ``n_selected`` with the lowest scores are averaged.

    Args:
        n_byzantine: How many gradients may be arbitrary.
        n_selected: How many are averaged.

    Raises:
        UsageError: Fewer than ``n_byzantine + 3`` or ``n_selected`` gradients.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.
    """

    n_byzantine = at_least(0)
    n_selected = at_least(1)

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__()
        self.n_byzantine = n_byzantine
        self.n_selected = n_selected

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights."""
        size = len(gram)
        if size < max(self.n_byzantine + 3, self.n_selected):
            raise UsageError(
                f"Krum needs at least {max(self.n_byzantine + 3, self.n_selected)} rows with "
                f"n_byzantine={self.n_byzantine} and n_selected={self.n_selected}, got {size}."
            )
        square = gram.diagonal()
        distance = (square[:, None] + square - 2 * gram).clamp(min=0).sqrt()
        # A gradient is its own nearest one, but rounding may say otherwise.
        distance.fill_diagonal_(torch.inf)
        scores = distance.sort(dim=1).values[:, : size - self.n_byzantine - 2].sum(1)
        chosen = scores.topk(self.n_selected, largest=False).indices
        return torch.zeros_like(scores).index_fill(0, chosen, 1 / self.n_selected)


class Krum(GramianWeightedAggregator[KrumWeighting]):
    """The mean of the gradients that are closest to their neighbours; see :class:`KrumWeighting`."""

    n_byzantine: Through[int] = Through()
    n_selected: Through[int] = Through()

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__(KrumWeighting(n_byzantine, n_selected))

    def __str__(self) -> str:
        return f"Krum{self.n_byzantine}-{self.n_selected}"


class TrimmedMean(ColumnAggregator):
    """The mean of each column without its greatest and smallest numbers.

    Args:
        trim_number: How many are left out on either side.

    Raises:
        UsageError: Fewer than ``2 trim_number + 1`` rows.

    Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.
    """

    trim_number = at_least(0)

    def __init__(self, trim_number: int) -> None:
        super().__init__()
        self.trim_number = trim_number

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the trimmed means."""
        kept = len(matrix) - 2 * self.trim_number
        if kept < 1:
            raise UsageError(f"matrix must have at least {2 * self.trim_number + 1} rows, got {len(matrix)}.")
        return matrix.sort(dim=0).values.narrow(0, self.trim_number, kept).mean(dim=0)

    def __str__(self) -> str:
        return f"TM{self.trim_number}"
