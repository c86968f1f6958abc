"""Fast adaptive multitask optimization."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.support.dtypes import falls_below
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights
from fastmtl.weighting.rules import counted

__all__ = ["FAMO"]


class FAMO(AbsWeighting):
    """Fast Adaptive Multitask Optimization: the slowest relative decrease of all losses is made as large as possible.

    With ``z = softmax(xi)`` and ``D = L - min_losses`` the weights are ``z_t / D_t``, divided by their sum. After the
    update the decrease of ``log D`` on the same batch is the gradient by which Adam moves xi. A task with ``D = 0``
    takes no part in a step.

    Source: Liu, Feng, Stone and Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023.
    """

    looks_back = True
    needs_losses = "positive"
    use_of_losses = "it takes the logarithms of what they are above min_losses, zeros unless set"
    hyper = {  # noqa: RUF012
        "FAMO_w_lr": Hyper(type=float, default=0.025, least=0.0, help="Learning rate of the logits of the weights."),
        "FAMO_w_gamma": Hyper(type=float, default=1e-3, least=0.0, help="Weight decay of the logits of the weights."),
    }

    min_losses: Tensor
    famo_value: Tensor
    famo_first: Tensor
    famo_second: Tensor
    famo_steps: Tensor

    def init_param(self) -> None:
        """Create the logits xi and their optimizer."""
        self.remember("min_losses", torch.zeros(self.task_num))
        self.remember("famo_value", torch.zeros(self.task_num))
        self.remember("famo_first", torch.zeros(self.task_num))
        self.remember("famo_second", torch.zeros(self.task_num))
        self.remember("famo_steps", torch.zeros(()))

    def weigh(self, losses: Tensor, gram: None, **hyper: object) -> Weights:
        """Return the derivatives of ``sum_t z_t log D_t / c``."""
        self._famo_losses = losses
        known = counted(losses - self.min_losses)
        return Weights(shared=ops.famo_weights(self.famo_value, losses, self.min_losses), known=known)

    def refused(self, losses: Tensor, **hyper: object) -> Tensor:
        """Return which losses are below their bounds."""
        return falls_below(losses, self.min_losses)

    def after_step(
        self, losses: Tensor, *, FAMO_w_lr: float = 0.025, FAMO_w_gamma: float = 1e-3, **hyper: object
    ) -> None:
        """Move the logits by how much each loss fell."""
        state = self.famo_value, self.famo_first, self.famo_second, self.famo_steps
        ops.famo_step_(*state, self._famo_losses, losses, self.min_losses, FAMO_w_lr, FAMO_w_gamma)
