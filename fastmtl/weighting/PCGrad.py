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
    takes_groups = True
    allows_rep_grad = False

    def draw_orders(self, like: Tensor) -> Tensor:
        """Return (T, T) random keys, by which each task orders all tasks, in all groups; ``like`` is a Gram matrix."""
        if not self.weighed_before:
            self._keys = torch.rand_like(like if like.dim() == 2 else like[0])
        return self._keys


class PCGrad(RandomOrders):
    """PCGrad: each task's gradient is projected, in random order, off the gradients it conflicts with.

    For j in random order ``p_i <- p_i - <p_i, g_j> / |g_j|^2 g_j`` where the product is negative; the update is the sum
    of the p_i. It is carried out on the Gram matrix, see :func:`fastmtl.ops.pcgrad`.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.
    """

    def weigh(self, losses: Tensor, gram: Tensor, **hyper: object) -> Weights:
        """Return the sums of the projected gradients' coefficients."""
        return Weights(shared=ops.pcgrad(gram, self.draw_orders(gram)))
