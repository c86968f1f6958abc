"""UPGrad and DualProj: projections onto the cone of the directions that conflict with no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import GramianWeightedAggregator, GramWeighting, MatrixWeighting
from fastmtl.aggregation.constant import MeanWeighting, Preference, preference_suffix
from fastmtl.linalg import DualConeProjector, QuadprogProjector
from fastmtl.support.settings import Through

__all__ = ["DualProj", "DualProjWeighting", "UPGrad", "UPGradWeighting"]


class _ConeWeighting(GramWeighting):
    settings = ("pref_vector", "projector")
    pref_vector = Preference(MeanWeighting)
    weighting: MatrixWeighting

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__()
        self.pref_vector = pref_vector
        self.projector = projector

    @property
    def projector(self) -> DualConeProjector:
        """What projects onto the dual cone."""
        return self._projector

    @projector.setter
    def projector(self, value: DualConeProjector | None) -> None:
        self._projector = QuadprogProjector() if value is None else value


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


class _ConeAggregator(GramianWeightedAggregator):
    pref_vector: Through[Tensor | None] = Through()
    projector: Through[DualConeProjector | None] = Through()

    def __str__(self) -> str:
        return f"{type(self).__name__}{preference_suffix(self.pref_vector)}"


class UPGrad(_ConeAggregator):
    """The mean of the gradients, each projected onto the dual cone of all; see :class:`UPGradWeighting`."""

    gramian_weighting: UPGradWeighting

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(UPGradWeighting(pref_vector, projector))


class DualProj(_ConeAggregator):
    """The mean gradient, projected onto the dual cone of all; see :class:`DualProjWeighting`."""

    gramian_weighting: DualProjWeighting

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(DualProjWeighting(pref_vector, projector))
