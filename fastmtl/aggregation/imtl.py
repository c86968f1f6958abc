"""Impartial multi-task learning."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import GramianWeightedAggregator, GramWeighting

__all__ = ["IMTLG", "IMTLGWeighting"]


class IMTLGWeighting(GramWeighting):
    """Weights, with sum one, of the update that projects equally onto all gradients; see :func:`fastmtl.ops.imtl`.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021.
    """

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights."""
        return ops.imtl(gram)


class IMTLG(GramianWeightedAggregator):
    """The update that projects equally onto all gradients; see :class:`IMTLGWeighting`."""

    def __init__(self) -> None:
        super().__init__(IMTLGWeighting())
