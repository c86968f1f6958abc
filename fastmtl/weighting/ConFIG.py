"""Conflict-free inverse gradients."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Weights

__all__ = ["ConFIG"]


class ConFIG(AbsWeighting):
    """ConFIG: the update has the same positive cosine to all task gradients, and the length of its projections' sum.

    Along ``b = pinv(U) 1``, U the unit gradients; see :func:`fastmtl.ops.config`.
    Computed from the (T, T) Gram matrix in place of a pseudo-inverse of the (T, P) gradients.

    Source: Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
    ICLR 2025.
    """

    needs = "gram"
    takes_groups = True

    def weigh(self, losses: Tensor, gram: Tensor, **hyper: object) -> Weights:
        """Return the weights of the conflict-free update."""
        return Weights(shared=ops.config(gram))
