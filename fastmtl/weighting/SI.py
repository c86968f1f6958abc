"""The sum of the losses' logarithms."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.weighting.abstract_weighting import AbsWeighting, Weights
from fastmtl.weighting.rules import counted

__all__ = ["SI"]


class SI(AbsWeighting):
    """Scale-Invariant weighting: the objective is ``sum_t log L_t``, so task t has the weight ``1 / L_t``.

    The factor a loss is measured in does not matter; losses must be positive. One of 0 takes no part in a step.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, baseline SI.
    """

    needs_losses = "positive"
    use_of_losses = "it takes their logarithms"

    def weigh(self, losses: Tensor, gram: None, **hyper: object) -> Weights:
        """Return the derivatives of the logarithms."""
        known = counted(losses)
        return Weights(shared=torch.where(known, 1 / losses, 0.0), known=known)
