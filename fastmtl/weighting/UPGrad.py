"""The mean of the task gradients' projections onto the cone of directions that harm no task."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights

__all__ = ["NORM_EPS", "REG_EPS", "UPGrad"]

NORM_EPS = Hyper(type=float, default=1e-4, least=0.0, help="Traces of G below it count as zero.")
REG_EPS = Hyper(type=float, default=1e-4, least=0.0, help="Added to the diagonal of the normalised G.")


class UPGrad(AbsWeighting):
    """UPGrad: the mean of the task gradients, each projected onto the cone of directions that harm no task.

    The projection of g_t is the p closest to it with ``<g_s, p> >= 0`` for all s; see :func:`fastmtl.ops.upgrad`.
    G is divided by its trace, or dropped where that is below ``UPGrad_norm_eps``, and ``UPGrad_reg_eps`` is added to
    its diagonal.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024.
    """

    needs = "gram"
    takes_groups = True
    allows_rep_grad = False
    hyper = {"UPGrad_norm_eps": NORM_EPS, "UPGrad_reg_eps": REG_EPS}  # noqa: RUF012

    def weigh(
        self,
        losses: Tensor,
        gram: Tensor,
        *,
        UPGrad_norm_eps: float = 1e-4,
        UPGrad_reg_eps: float = 1e-4,
        **hyper: object,
    ) -> Weights:
        """Return the mean of the projections' weights."""
        return Weights(shared=ops.upgrad(gram, UPGrad_norm_eps, UPGrad_reg_eps))
