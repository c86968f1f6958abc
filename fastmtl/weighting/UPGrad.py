"""Projections onto the cone of directions that harm no task."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.linalg import QuadprogProjector
from fastmtl.weighting.base import AbsWeighting, Hyper, Weights

__all__ = ["DualProj", "UPGrad"]

_NORM_EPS = Hyper(type=float, default=1e-4, least=0.0, help="Traces of G below it count as zero.")
_REG_EPS = Hyper(type=float, default=1e-4, least=0.0, help="Added to the diagonal of the normalised G.")


class UPGrad(AbsWeighting):
    """UPGrad: the mean of the task gradients, each projected onto the cone of directions that harm no task.

    G is divided by its trace, or dropped where that is below ``UPGrad_norm_eps``, and ``UPGrad_reg_eps`` is added to
    its diagonal.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024.
    """

    needs = "gram"
    allows_rep_grad = False
    hyper = {"UPGrad_norm_eps": _NORM_EPS, "UPGrad_reg_eps": _REG_EPS}  # noqa: RUF012

    def weigh(
        self,
        losses: Tensor,
        gram: Tensor,
        *,
        UPGrad_norm_eps: float = 1e-4,
        UPGrad_reg_eps: float = 1e-4,
        **hyper: object,
    ) -> Weights:
        """Return the weights."""
        return Weights(shared=ops.upgrad(gram, UPGrad_norm_eps, UPGrad_reg_eps))


class DualProj(AbsWeighting):
    """DualProj: the mean gradient, projected onto the cone of directions that harm no task.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017.
    """

    needs = "gram"
    allows_rep_grad = False
    hyper = {"DualProj_norm_eps": _NORM_EPS, "DualProj_reg_eps": _REG_EPS}  # noqa: RUF012

    def weigh(
        self,
        losses: Tensor,
        gram: Tensor,
        *,
        DualProj_norm_eps: float = 1e-4,
        DualProj_reg_eps: float = 1e-4,
        **hyper: object,
    ) -> Weights:
        """Return the weights."""
        project = QuadprogProjector(norm_eps=DualProj_norm_eps, reg_eps=DualProj_reg_eps)
        return Weights(shared=project(torch.full_like(gram[0], 1 / len(gram)), gram))
