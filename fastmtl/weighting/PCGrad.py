"""Gradient surgery."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Weights

__all__ = ["PCGrad", "RandomOrders"]


class RandomOrders(AbsWeighting):
    """Base of strategies in which each task meets the others in random order."""

    needs = "gram"
    allows_rep_grad = False

    keys: Tensor | None = None

    def draw_orders(self, like: Tensor) -> Tensor:
        """Return for each task random keys of all tasks, by which they are ordered; of the shape of ``like``.

        Groups of parameters that are weighed one after the other in a step get the same ones.
        """
        if self.keys is None or not self.weighs_rest:
            self.keys = torch.rand_like(like)
        return self.keys


class PCGrad(RandomOrders):
    """PCGrad: each task's gradient is projected, in random order, off the gradients it conflicts with.

    For j in random order ``p_i <- p_i - <p_i, g_j> / |g_j|^2 g_j`` where the product is negative; the update is the sum
    of the p_i. It is carried out on the Gram matrix, see :func:`fastmtl.ops.pcgrad`.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.
    """

    takes_groups = True

    def weigh(self, losses: Tensor, gram: Tensor, **hyper: object) -> Weights:
        """Return the sums of the projected gradients' coefficients."""
        return Weights(shared=ops.pcgrad(gram, self.draw_orders(gram if gram.dim() == 2 else gram[0])))
