"""Conflict-averse gradient descent."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights

__all__ = ["CAGrad"]


class CAGrad(AbsWeighting):
    """Conflict-Averse Gradient descent: the worst local improvement is maximised near the average gradient g0.

    With w the solution of the dual problem and ``g_w = sum_t w_t g_t`` the update is
    ``g0 + calpha |g0| / |g_w| g_w``, divided by 1, ``1 + calpha^2`` or ``1 + calpha`` for ``rescale`` 0, 1, 2.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021.
    """

    needs = "gram"
    takes_groups = True
    allows_rep_grad = False
    hyper = {  # noqa: RUF012
        "calpha": Hyper(
            type=float, default=0.5, least=0.0, help="Radius around the average gradient, relative to its norm."
        ),
        "rescale": Hyper(
            type=int, default=1, choices=(0, 1, 2), help="Divide by 1 (0), 1 + calpha^2 (1) or 1 + calpha (2)."
        ),
    }

    def weigh(self, losses: Tensor, gram: Tensor, *, calpha: float = 0.5, rescale: int = 1, **hyper: object) -> Weights:
        """Return the weights of the update; the dual solution is what is logged."""
        weights, update = ops.cagrad_update(gram, calpha).unbind(-2)
        return Weights(shared=update / (1.0, 1 + calpha**2, 1 + calpha)[rescale], logged=weights)
