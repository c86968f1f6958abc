"""Multi-objective meta learning."""

from __future__ import annotations

from fastmtl import ops
from fastmtl.engine.lookahead import LookAhead
from fastmtl.weighting.abstract_weighting import Weights
from fastmtl.weighting.AutoLambda import INNER_LR, INNER_STEP, OUTER_LR, Bilevel

__all__ = ["MOML"]


class MOML(Bilevel):
    """Multi-Objective Meta Learning: weights that help all tasks one step ahead, by min-norm over their meta-gradients.

    A step on half a batch leads from theta to ``theta' = theta - inner_lr sum_t w_t f_t``, f_t the gradient of task t
    there. The loss of task k at theta' on the other half changes with the weights by ``-inner_lr <F_k, f_t>``, F_k its
    gradient at theta': a T x T matrix, part of one Gram matrix. Its rows, with respect to the logits and normalised,
    have a min-norm combination, along which Adam moves the logits. The model then takes a step on another batch.

    Source: Ye et al., "Multi-Objective Meta Learning", NeurIPS 2021.
    """

    samples = 2
    hyper = {"outer_lr": OUTER_LR, "inner_lr": INNER_LR, "inner_step": INNER_STEP}  # noqa: RUF012

    def look_ahead(
        self, ahead: LookAhead, *, outer_lr: float = 1e-3, inner_lr: float = 0.1, **hyper: object
    ) -> Weights:
        """Return the weights for the next batch."""
        size = self.task_num
        _, here = ahead.rows(ahead.inner)
        with ahead.moved():
            ahead.move(ahead.weighted(here, self.task_weights()), -inner_lr)
            _, there = ahead.rows(ahead.outer)
        products = ops.gram([*there, *here])[:size, size:]
        slopes = self.through_softmax(-inner_lr * products)
        length = slopes.norm(dim=1, keepdim=True)
        slopes = slopes / length.where(length > 0, 1.0)
        slope = ops.min_norm(slopes @ slopes.T) @ slopes
        self.logits.step(slope.to(self.logits.value.dtype), lr=outer_lr)
        return Weights(shared=self.task_weights())
