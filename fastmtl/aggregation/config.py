"""Conflict-free inverse gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import Aggregator, MatrixWeighting, is_derived, is_watched
from fastmtl.aggregation.constant import Preference, SumWeighting, preference_suffix
from fastmtl.aggregation.rows import add_combined, gram_of

__all__ = ["ConFIG"]


class ConFIG(Aggregator):
    """The update with the same cosine to all gradients; see :func:`fastmtl.ops.config`.

    Args:
        pref_vector: (T,) cosines in proportion to which those of the update shall be; equal ones if None.

    Source: Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
    ICLR 2025.
    """

    pref_vector = Preference(SumWeighting)
    weighting: MatrixWeighting

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__()
        self.pref_vector = pref_vector

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the update."""
        return self._weights([matrix]).to(matrix.dtype) @ matrix

    def write(self, jacobians: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor | None:
        """Add the update to ``.grad``; see :meth:`Aggregator.write`."""
        if is_watched(self) or is_derived(self):
            return super().write(jacobians, tensors)
        add_combined(tensors, jacobians, self._weights(jacobians))
        return None

    def _weights(self, jacobians: Sequence[Tensor]) -> Tensor:
        gram = gram_of(jacobians)
        return ops.config(gram, None if self.pref_vector is None else self.weighting(gram).to(gram))

    def __str__(self) -> str:
        return f"ConFIG{preference_suffix(self.pref_vector)}"
