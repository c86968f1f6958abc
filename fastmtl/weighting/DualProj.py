"""Dual projection."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.linalg import QuadprogProjector
from fastmtl.support.hyper import Hyper
from fastmtl.weighting.base import AbsWeighting, Weights

__all__ = ["DualProj"]


class DualProj(AbsWeighting):
    """DualProj: the mean gradient, projected onto the cone of directions that harm no task.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017.
    """

    needs = "gram"
    allows_rep_grad = False
    hyper = {  # noqa: RUF012
        "DualProj_norm_eps": Hyper(type=float, default=1e-4, least=0.0, help="Traces of G below it count as zero."),
        "DualProj_reg_eps": Hyper(
            type=float, default=1e-4, least=0.0, help="Added to the diagonal of the normalised G."
        ),
    }

    def weigh(
        self,
        losses: Tensor,
        gram: Tensor | None,
        *,
        DualProj_norm_eps: float = 1e-4,
        DualProj_reg_eps: float = 1e-4,
        **hyper: object,
    ) -> Weights:
        """Return the weights."""
        assert gram is not None
        project = QuadprogProjector(norm_eps=DualProj_norm_eps, reg_eps=DualProj_reg_eps)
        return Weights(shared=project(torch.full_like(gram[0], 1 / len(gram)), gram))
