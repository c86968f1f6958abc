"""The sum of the losses' logarithms."""

from __future__ import annotations

from torch import Tensor

from fastmtl.weighting.base import AbsWeighting, Weights

__all__ = ["SI"]


class SI(AbsWeighting):
    """Scale-Invariant weighting: the objective is ``sum_t log L_t``, so task t has the weight ``1 / L_t``.

    The factor a loss is measured in does not matter; losses must be positive.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, baseline SI.
    """

    def weigh(self, losses: Tensor, gram: None, **hyper: object) -> Weights:
        """Return the derivatives of the logarithms."""
        return Weights(shared=1 / losses)
