"""Aggregators that look at each column of the Jacobian by itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtl.aggregation.base import Aggregator, is_derived, is_watched
from fastmtl.aggregation.rows import as_matrix, put

__all__ = ["ColumnAggregator"]


class ColumnAggregator(Aggregator):
    """An aggregator of which each tensor's gradient follows from that tensor's Jacobian."""

    def write(self, jacobians: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor | None:
        """Aggregate one tensor after the other into ``.grad``; see :meth:`Aggregator.write`."""
        if is_watched(self) or is_derived(self):
            return super().write(jacobians, tensors)
        for jacobian, tensor in zip(jacobians, tensors, strict=True):
            put([self(as_matrix(jacobian)).reshape(tensor.shape)], [tensor])
        return None
