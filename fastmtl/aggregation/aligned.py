"""Independent component alignment."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import GramianWeightedAggregator, GramWeighting, MatrixWeighting
from fastmtl.aggregation.constant import MeanWeighting, Preference, preference_suffix
from fastmtl.errors import UsageError
from fastmtl.ops._eigh import Scale
from fastmtl.support.settings import Through

__all__ = ["AlignedMTL", "AlignedMTLWeighting"]


class AlignedMTLWeighting(GramWeighting):
    """Weights of Aligned-MTL; see :func:`fastmtl.ops.aligned`.

    Args:
        pref_vector: (T,) weights of the aligned gradients; 1 / T if None.
        scale_mode: Length of the aligned gradients: that of the shortest principal component (``"min"``), of the
            ``"median"`` one, or the root mean square of all (``"rmse"``).

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023.
    """

    settings = ("pref_vector", "scale_mode")
    pref_vector = Preference(MeanWeighting)
    weighting: MatrixWeighting

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: Scale = "min") -> None:
        super().__init__()
        self.pref_vector = pref_vector
        self.scale_mode = scale_mode

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights."""
        if self.scale_mode not in ("min", "median", "rmse"):
            raise UsageError(f"Invalid scale_mode={self.scale_mode!r}. Expected 'min', 'median' or 'rmse'.")
        if self.pref_vector is None:
            return ops.aligned(gram, scale=self.scale_mode) / len(gram)
        return ops.aligned(gram, self.weighting(gram).to(gram), self.scale_mode)


class AlignedMTL(GramianWeightedAggregator):
    """The mean of the aligned gradients; see :class:`AlignedMTLWeighting`."""

    gramian_weighting: AlignedMTLWeighting
    pref_vector: Through[Tensor | None] = Through()
    scale_mode: Through[Scale] = Through()

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: Scale = "min") -> None:
        super().__init__(AlignedMTLWeighting(pref_vector, scale_mode))

    def __str__(self) -> str:
        return f"AlignedMTL{preference_suffix(self.pref_vector)}"
