"""Equal weighting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.weighting.base import AbsWeighting, Weights

__all__ = ["EW"]


class EW(AbsWeighting):
    """Equal Weighting: every loss has weight 1, the update is the sum of the task gradients."""

    needs = "losses"

    def weigh(self, losses: Tensor, gram: Tensor | None, **hyper: Any) -> Weights:
        """Return ones."""
        return Weights(shared=torch.ones_like(losses))
