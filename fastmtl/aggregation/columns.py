"""Aggregators that look at each column of the Jacobian by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmtl.aggregation.base import ColumnAggregator
from fastmtl.errors import UsageError
from fastmtl.support.settings import Declared, setting, vector, vector_string

__all__ = ["GradDrop", "TrimmedMean"]


def _identity(purity: Tensor) -> Tensor:
    return purity


class GradDrop(Declared, ColumnAggregator):
    """The sum of each column's numbers of one sign, which is drawn with the probability given by their purity.

    With the purity ``P = f((1 + sum_t v_t / sum_t |v_t|) / 2)`` and U uniform, positive numbers v stay where ``P > U``,
    negative ones where ``P < U``.

    Args:
        f: Applied to the purity, monotone.
        leak: (T,) shares of the dropped numbers that are kept; zeros if None.

    Raises:
        UsageError: ``leak`` is not one-dimensional or has not one entry per row.

    Source: Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020,
    Algorithm 1, lines 10 to 15.
    """

    f: Callable[[Tensor], Tensor] = setting(default=_identity)
    leak: Tensor | None = vector(default=None)

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the (P,) sums of the numbers that stay."""
        if self.leak is not None and len(self.leak) != len(matrix):
            raise UsageError(f"matrix must have {len(self.leak)} rows, one per leak, got {len(matrix)}.")
        size = matrix.abs().sum(0)
        purity = self.f(0.5 * (1 + matrix.sum(0) / torch.where(size > 0, size, 1.0)))
        noise = torch.rand(matrix.shape[1:], dtype=matrix.dtype, device=matrix.device)
        share = (((purity > noise) & (matrix > 0)) | ((purity < noise) & (matrix < 0))).to(matrix.dtype)
        if self.leak is not None:
            leak = self.leak.to(matrix)[:, None]
            share = leak + (1 - leak) * share
        return (share * matrix).sum(0)

    def __str__(self) -> str:
        return "GradDrop" if self.leak is None else f"GradDrop([{vector_string(self.leak)}])"


class TrimmedMean(Declared, ColumnAggregator):
    """The mean of each column without its greatest and smallest numbers.

    Args:
        trim_number: How many are left out on either side.

    Raises:
        UsageError: Fewer than ``2 trim_number + 1`` rows.

    Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.
    """

    trim_number: int = setting(least=0)

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the (P,) trimmed means."""
        kept = len(matrix) - 2 * self.trim_number
        if kept < 1:
            raise UsageError(f"matrix must have at least {2 * self.trim_number + 1} rows, got {len(matrix)}.")
        return matrix.sort(dim=0).values.narrow(0, self.trim_number, kept).mean(dim=0)

    def __str__(self) -> str:
        return f"TM{self.trim_number}"
