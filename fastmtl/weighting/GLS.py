"""The geometric mean of the losses."""

from __future__ import annotations

from torch import Tensor

from fastmtl.weighting.base import AbsWeighting, Weights

__all__ = ["GLS"]


class GLS(AbsWeighting):
    """Geometric Loss Strategy: the objective is the geometric mean of the losses, which must be positive.

    Its gradient weighs task t with ``(prod_s L_s)^(1/T) / (T L_t)``.

    Source: Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning", CVPR Workshops 2019.
    """

    def weigh(self, losses: Tensor, gram: None, **hyper: object) -> Weights:
        """Return the derivatives of the geometric mean."""
        # The mean of logarithms: the product of many small losses would underflow.
        return Weights(shared=losses.log().mean().exp() / (len(losses) * losses))
