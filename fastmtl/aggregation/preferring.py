"""Aggregators with a preference: a vector of how much each task counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import Aggregator, GramianWeightedAggregator, GramWeighting, MatrixWeighting
from fastmtl.aggregation.constant import ConstantWeighting, MeanWeighting, SumWeighting
from fastmtl.aggregation.rows import add_combined, gram_of
from fastmtl.errors import UsageError
from fastmtl.linalg import DualConeProjector, QuadprogProjector
from fastmtl.ops._eigh import Scale
from fastmtl.support.settings import Attribute, Through, vector_string

__all__ = [
    "AlignedMTL",
    "AlignedMTLWeighting",
    "ConFIG",
    "DualProj",
    "DualProjWeighting",
    "UPGrad",
    "UPGradWeighting",
]


class Preference(Attribute[Tensor | None]):
    """The attribute ``pref_vector``: a (T,) tensor or None for equal preference.

    Setting it also sets ``weighting`` of its owner, whose forward hooks see the preferences that are used; one of the
    ``default`` class stands for None.
    """

    def __init__(self, default: type[MatrixWeighting]) -> None:
        self.default = default

    def __set__(self, instance: object, value: Tensor | None) -> None:
        if value is not None and value.dim() != 1:
            raise UsageError(f"pref_vector must have the shape (T,), got {tuple(value.shape)}.")
        setattr(instance, "weighting", self.default() if value is None else ConstantWeighting(value))  # noqa: B010
        super().__set__(instance, value)


def _suffix(preference: Tensor | None) -> str:
    """Return what a preference adds to the name of an aggregator."""
    return "" if preference is None else f"([{vector_string(preference)}])"


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


class AlignedMTL(GramianWeightedAggregator[AlignedMTLWeighting]):
    """The mean of the aligned gradients; see :class:`AlignedMTLWeighting`."""

    pref_vector: Through[Tensor | None] = Through()
    scale_mode: Through[Scale] = Through()

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: Scale = "min") -> None:
        super().__init__(AlignedMTLWeighting(pref_vector, scale_mode))

    def __str__(self) -> str:
        return f"AlignedMTL{_suffix(self.pref_vector)}"


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
        if not self.is_plain():
            return super().write(jacobians, tensors)
        add_combined(tensors, jacobians, self._weights(jacobians))
        return None

    def _weights(self, jacobians: Sequence[Tensor]) -> Tensor:
        gram = gram_of(jacobians)
        return ops.config(gram, None if self.pref_vector is None else self.weighting(gram).to(gram))

    def __str__(self) -> str:
        return f"ConFIG{_suffix(self.pref_vector)}"


class _Projector(Attribute[DualConeProjector]):
    """What projects onto the dual cone."""

    def __set__(self, instance: object, value: DualConeProjector | None) -> None:
        super().__set__(instance, QuadprogProjector() if value is None else value)


class _ConeWeighting(GramWeighting):
    pref_vector = Preference(MeanWeighting)
    projector = _Projector()
    weighting: MatrixWeighting

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__()
        self.pref_vector = pref_vector
        self.projector = projector


class UPGradWeighting(_ConeWeighting):
    """Weights of UPGrad: each gradient is projected onto the dual cone, and the projections are averaged.

    Args:
        pref_vector: (T,) weights of the average; 1 / T if None.
        projector: Projects; :class:`fastmtl.linalg.QuadprogProjector` if None.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024.
    """

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights."""
        project = self.projector
        if self.pref_vector is None and type(project) is QuadprogProjector:
            return ops.upgrad(gram, project.norm_eps, project.reg_eps)
        return project(torch.diag(self.weighting(gram).to(gram)), gram).sum(0)


class DualProjWeighting(_ConeWeighting):
    """Weights of DualProj: the mean gradient, projected onto the dual cone.

    Args:
        pref_vector: (T,) weights of the mean; 1 / T if None.
        projector: Projects; :class:`fastmtl.linalg.QuadprogProjector` if None.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017.
    """

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights."""
        return self.projector(self.weighting(gram).to(gram), gram)


class _ConeAggregator(GramianWeightedAggregator[_ConeWeighting]):
    pref_vector: Through[Tensor | None] = Through()
    projector: Through[DualConeProjector | None] = Through()

    def __str__(self) -> str:
        return f"{type(self).__name__}{_suffix(self.pref_vector)}"


class UPGrad(_ConeAggregator):
    """The mean of the gradients, each projected onto the dual cone of all; see :class:`UPGradWeighting`."""

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(UPGradWeighting(pref_vector, projector))


class DualProj(_ConeAggregator):
    """The mean gradient, projected onto the dual cone of all; see :class:`DualProjWeighting`."""

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(DualProjWeighting(pref_vector, projector))
