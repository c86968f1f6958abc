"""Gradient sign dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmtl.aggregation.base import ColumnAggregator
from fastmtl.errors import UsageError
from fastmtl.support.settings import optional_vector, vector_string

__all__ = ["GradDrop"]


def _identity(purity: Tensor) -> Tensor:
    return purity


class GradDrop(ColumnAggregator):
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

    settings = ("f", "leak")
    leak = optional_vector()

    def __init__(self, f: Callable[[Tensor], Tensor] = _identity, leak: Tensor | None = None) -> None:
        super().__init__()
        self.f = f
        self.leak = leak

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the sums."""
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
