"""Impartial multi-task learning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Weights

__all__ = ["IMTL"]


class IMTL(AbsWeighting):
    """Impartial Multi-Task Learning: losses are scaled by learned factors, gradients get equal projections.

    IMTL-L trains ``exp(s_t) L_t - s_t`` with s the parameter ``loss_scale``; IMTL-G combines the gradients of the
    scaled losses so that the update has the same projection on each of them.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021.
    """

    needs = "gram"
    takes_groups = True
    needs_losses = "non-negative"
    use_of_losses = "with others the scales it learns grow without end"
    weighs_heads = True

    def init_param(self) -> None:
        """Create ``loss_scale``."""
        self.loss_scale = nn.Parameter(torch.zeros(self.task_num))

    def weigh(self, losses: Tensor, gram: Tensor, **hyper: object) -> Weights:
        """Return the weights of equal projections, of decoders the scales, and the gradient of ``loss_scale``."""
        scale = self.loss_scale.detach().exp()
        wide = scale.to(gram.dtype)
        alpha = ops.imtl(wide[:, None] * gram * wide)
        return Weights(
            shared=alpha * wide, heads=scale, logged=alpha, own_grads={"loss_scale": scale * losses.clamp(min=0) - 1}
        )
