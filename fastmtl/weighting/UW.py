"""Uncertainty weighting."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.weighting.abstract_weighting import AbsWeighting, Weights

__all__ = ["UW"]


class UW(AbsWeighting):
    """Uncertainty Weighting: each loss is divided by twice a learned variance ``exp(s_t)``.

    The objective is ``sum_t L_t / (2 exp(s_t)) + s_t / 2``; ``s`` is the parameter ``loss_scale``.

    Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", CVPR 2018.
    """

    needs_losses = "non-negative"
    use_of_losses = "with others the variances it learns shrink without end"

    def init_param(self) -> None:
        """Create ``loss_scale``."""
        self.loss_scale = nn.Parameter(torch.full((self.task_num,), -0.5))

    def weigh(self, losses: Tensor, gram: None, **hyper: object) -> Weights:
        """Return ``1 / (2 exp(s))`` and the gradient of ``s``."""
        weights = 0.5 * torch.exp(-self.loss_scale.detach())
        return Weights(shared=weights, own_grads={"loss_scale": 0.5 - weights * losses.clamp(min=0)})
