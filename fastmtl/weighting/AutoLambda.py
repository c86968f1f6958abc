"""Auto-Lambda."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.engine.lookahead import LookAhead
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights
from fastmtl.weighting.rules import Adam

__all__ = ["INNER_LR", "INNER_STEP", "OUTER_LR", "AutoLambda", "Bilevel"]

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


class AutoLambda(Bilevel):
    """Auto-Lambda: weights under which a training step lowers the sum of all losses on data it has not seen.

    A step on half a batch leads to ``theta' = theta - lr sum_t w_t f_t``, lr the model's learning rate. With d the
    gradient at theta' of the sum of the losses on the other half, that sum changes with w_t by ``-lr <d, f_t>``: the
    change of task t's loss along d, taken from two forward passes at ``theta +- eps d``, ``eps = 0.01 / |d|``. Adam
    moves the logits against it. The model then takes a step on another batch. Where groups of parameters have learning
    rates of their own, lr is a diagonal matrix.

    Source: Liu et al., "Auto-Lambda: Disentangling Dynamic Task Relationships", TMLR 2022.
    """

    samples = 2
    hyper = {"outer_lr": OUTER_LR, "inner_step": INNER_STEP}  # noqa: RUF012

    def look_ahead(self, ahead: LookAhead, *, outer_lr: float = 1e-3, **hyper: object) -> Weights:
        """Return the weights for the next batch."""
        weights = self.task_weights()
        with ahead.moved():
            _, step = ahead.gradient(ahead.inner, weights)
            ahead.move(ahead.by_rates(step), -ahead.lr)
            _, direction = ahead.gradient(ahead.outer, torch.ones_like(weights))
            direction = ahead.by_rates(direction)
        length = torch.stack([part.norm() for part in direction if part is not None]).norm()
        reach = 0.01 / length.where(length > 0, 1.0)
        losses = []
        for sign in (1, -1):
            with ahead.moved():
                ahead.move(direction, sign * reach)
                losses.append(ahead.losses(ahead.inner))
        slope = self.through_softmax((losses[0] - losses[1]) / (2 * reach))
        self.logits.step(-ahead.lr * slope, lr=outer_lr)
        return Weights(shared=self.task_weights())
