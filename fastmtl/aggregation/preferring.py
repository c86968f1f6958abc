"""Aggregators with a preference: a vector of how much each task counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, overload

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import Aggregator, GramianWeightedAggregator, GramWeighting, MatrixWeighting
from fastmtl.aggregation.constant import ConstantWeighting, MeanWeighting, SumWeighting
from fastmtl.aggregation.rows import add_combined, gram_of
from fastmtl.errors import UsageError
from fastmtl.linalg import DualConeProjector, QuadprogProjector
from fastmtl.ops._eigh import Scale
from fastmtl.support.settings import Declared, Setting, setting, vector_string

__all__ = [
    "AlignedMTL",
    "AlignedMTLWeighting",
    "ConFIG",
    "DualProj",
    "DualProjWeighting",
    "UPGrad",
    "UPGradWeighting",
]


class Preference(Setting):
    """The setting ``pref_vector``: a (T,) tensor or None for equal preference.

    Setting it also sets ``weighting`` of its owner, whose forward hooks see the preferences that are used; one of the
    ``equal`` class stands for None.
    """

    def __init__(self, equal: type[MatrixWeighting]) -> None:
        super().__init__(default=None)
        self.equal = equal

    def __set__(self, instance: Any, value: Tensor | None) -> None:
        if value is not None and value.dim() != 1:
            raise UsageError(f"pref_vector must have the shape (T,), got {tuple(value.shape)}.")
        instance.weighting = self.equal() if value is None else ConstantWeighting(value)
        super().__set__(instance, value)


def _preference(equal: type[MatrixWeighting]) -> Any:
    """Declare a preference; the attribute's type is the one it is annotated with."""
    return Preference(equal)


def _preferences(owner: Any, gram: Tensor) -> Tensor:
    """Return the (T,) preferences of an owner of one, after forward hooks on its ``weighting``."""
    return owner.weighting(gram).to(gram)


def _suffix(preference: Tensor | None) -> str:
    """Return the preference as a suffix of an aggregator's name."""
    return "" if preference is None else f"([{vector_string(preference)}])"


class AlignedMTLWeighting(GramWeighting):
    """Weights of Aligned-MTL; see :func:`fastmtl.ops.aligned`.

    Args:
        pref_vector: (T,) weights of the aligned gradients; 1 / T if None.
        scale_mode: Length of the aligned gradients: that of the shortest principal component (``"min"``), of the
            ``"median"`` one, or the root mean square of all (``"rmse"``).

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023.
    """

    pref_vector: Tensor | None = _preference(MeanWeighting)
    scale_mode: Scale = setting(default="min")

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights of the gradients for the weighted sum of the aligned ones."""
        if self.scale_mode not in ("min", "median", "rmse"):
            raise UsageError(f"Invalid scale_mode={self.scale_mode!r}. Expected 'min', 'median' or 'rmse'.")
        if self.pref_vector is None:
            return ops.aligned(gram, scale=self.scale_mode) / len(gram)
        return ops.aligned(gram, _preferences(self, gram), self.scale_mode)


class AlignedMTL(Declared, GramianWeightedAggregator[AlignedMTLWeighting], of=AlignedMTLWeighting):
    """The mean of the aligned gradients; see :class:`AlignedMTLWeighting`."""

    pref_vector: Tensor | None = AlignedMTLWeighting.pref_vector
    scale_mode: Scale = AlignedMTLWeighting.scale_mode

    def __str__(self) -> str:
        return f"AlignedMTL{_suffix(self.pref_vector)}"


class ConFIG(Declared, Aggregator):
    """The update with the same cosine to all gradients; see :func:`fastmtl.ops.config`.

    Args:
        pref_vector: (T,) proportions of the update's cosines to the gradients; equal ones if None.

    Source: Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
    ICLR 2025.
    """

    pref_vector: Tensor | None = _preference(SumWeighting)

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
        return ops.config(gram, None if self.pref_vector is None else _preferences(self, gram))

    def __str__(self) -> str:
        return f"ConFIG{_suffix(self.pref_vector)}"


class _Projector(Setting):
    """What projects onto the dual cone."""

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> DualConeProjector: ...
    def __get__(self, instance: object, owner: type) -> Any:
        return super().__get__(instance, owner)

    def __set__(self, instance: object, value: DualConeProjector | None) -> None:
        super().__set__(instance, QuadprogProjector() if value is None else value)


class _ConeWeighting(GramWeighting):
    pref_vector: Tensor | None = _preference(MeanWeighting)
    projector: _Projector = _Projector(default=None)


class UPGradWeighting(_ConeWeighting):
    """Weights of UPGrad: each gradient is projected onto the dual cone, and the projections are averaged.

    Args:
        pref_vector: (T,) weights of the average; 1 / T if None.
        projector: Projects; :class:`fastmtl.linalg.QuadprogProjector` if None.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024.
    """

    takes_groups = True

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weighted sum of the projections' weights."""
        project = self.projector
        if self.pref_vector is None and type(project) is QuadprogProjector:
            return ops.upgrad(gram, project.norm_eps, project.reg_eps)
        # A projector of the user's has one Gram matrix.
        if gram.dim() == 3:
            return torch.stack([self.weigh(matrix) for matrix in gram])
        return project(torch.diag(_preferences(self, gram)), gram).sum(0)


class DualProjWeighting(_ConeWeighting):
    """Weights of DualProj: the mean gradient, projected onto the dual cone.

    Args:
        pref_vector: (T,) weights of the mean; 1 / T if None.
        projector: Projects; :class:`fastmtl.linalg.QuadprogProjector` if None.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017.
    """

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the projection's weights."""
        return self.projector(_preferences(self, gram), gram)


class _ConeAggregator(Declared, GramianWeightedAggregator[_ConeWeighting], of=_ConeWeighting):
    pref_vector: Tensor | None = _ConeWeighting.pref_vector
    projector: _Projector = _ConeWeighting.projector

    def __str__(self) -> str:
        return f"{type(self).__name__}{_suffix(self.pref_vector)}"


class UPGrad(_ConeAggregator, of=UPGradWeighting):
    """The mean of the gradients, each projected onto the dual cone of all; see :class:`UPGradWeighting`."""


class DualProj(_ConeAggregator, of=DualProjWeighting):
    """The mean gradient, projected onto the dual cone of all; see :class:`DualProjWeighting`."""
