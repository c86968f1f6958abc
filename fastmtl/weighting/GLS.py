"""The geometric mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.weighting.abstract_weighting import AbsWeighting, Weights
from fastmtl.weighting.rules import counted, geometric_mean

__all__ = ["GLS"]


class GLS(AbsWeighting):
    """Geometric Loss Strategy: the objective is the geometric mean of the losses, which must be positive.

    Its gradient weighs task t with ``(prod_s L_s)^(1/T) / (T L_t)``. The mean is that of the losses that are not 0.

    Source: Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning", CVPR Workshops 2019.
    """

    needs_losses = "positive"
    use_of_losses = "it takes their geometric mean"

    def weigh(self, losses: Tensor, gram: None, **hyper: object) -> Weights:
        """Return the derivatives of the geometric mean."""
        known = counted(losses)
        mean, number = geometric_mean(losses, known), known.sum().clamp(min=1)
        return Weights(shared=torch.where(known, mean / (number * losses), 0.0), known=known)
