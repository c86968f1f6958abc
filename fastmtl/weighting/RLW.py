"""Random loss weighting."""

from __future__ import annotations

from torch import Tensor

from fastmtl.weighting.abstract_weighting import AbsWeighting, Weights
from fastmtl.weighting.rules import random_weights

__all__ = ["RLW"]


class RLW(AbsWeighting):
    """Random Loss Weighting: in every step the softmax of standard normal numbers.

    Source: Lin, Ye and Zhang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
    TMLR 2022.
    """

    reads_losses = False

    def draw(self, like: Tensor) -> Tensor:
        """Return (T,) weights of the dtype and device of ``like``."""
        return random_weights(like)

    def weigh(self, losses: Tensor, gram: None, **hyper: object) -> Weights:
        """Return random weights."""
        return Weights(shared=self.draw(losses))
