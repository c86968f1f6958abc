"""What the bilevel strategies share: task weights learned as the softmax of logits, by gradients of an upper level."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.support.hyper import Hyper
from fastmtl.weighting.adam import Adam
from fastmtl.weighting.base import AbsWeighting

__all__ = ["INNER_LR", "INNER_STEP", "OUTER_LR", "Bilevel"]

OUTER_LR = Hyper(type=float, default=1e-3, least=0.0, help="Learning rate of the logits of the task weights.")
INNER_LR = Hyper(type=float, default=0.1, least=0.0, help="Learning rate of the steps the strategy looks ahead.")
INNER_STEP = Hyper(
    type=int, default=1, help="Steps the strategy looks ahead; this one is made for a single one.", choices=(1,)
)


class Bilevel(AbsWeighting):
    """Base of the strategies whose weights are the upper level of a problem that training is the lower level of."""

    needs = "lookahead"
    allows_rep_grad = False

    def init_param(self) -> None:
        """Create the logits and their optimizer."""
        self.logits = Adam(self, "task_weight", torch.full((self.task_num,), 1 / self.task_num))

    def task_weights(self) -> Tensor:
        """Return the (T,) weights."""
        return torch.softmax(self.logits.value, dim=-1)

    def through_softmax(self, slope: Tensor) -> Tensor:
        """Return gradients (..., T) with respect to the logits from those with respect to the weights."""
        weights = self.task_weights().to(slope.dtype)
        return weights * (slope - (slope * weights).sum(-1, keepdim=True))
