"""The mean gradient, projected onto the cone of directions that harm no task."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.linalg import QuadprogProjector
from fastmtl.weighting.abstract_weighting import AbsWeighting, Weights
from fastmtl.weighting.UPGrad import NORM_EPS, REG_EPS

__all__ = ["DualProj"]


class DualProj(AbsWeighting):
    """DualProj: the mean gradient, projected onto the cone of directions that harm no task.

    The update is the d closest to g0, the mean, with ``<g_t, d> >= 0`` for all t; see :func:`fastmtl.ops.dual_cone`.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017.
    """

    needs = "gram"
    takes_groups = True
    allows_rep_grad = False
    hyper = {"DualProj_norm_eps": NORM_EPS, "DualProj_reg_eps": REG_EPS}  # noqa: RUF012

    def weigh(
        self,
        losses: Tensor,
        gram: Tensor,
        *,
        DualProj_norm_eps: float = 1e-4,
        DualProj_reg_eps: float = 1e-4,
        **hyper: object,
    ) -> Weights:
        """Return the projection's weights."""
        project = QuadprogProjector(norm_eps=DualProj_norm_eps, reg_eps=DualProj_reg_eps)
        return Weights(shared=project(torch.full_like(gram[..., 0], 1 / gram.shape[-1]), gram))
