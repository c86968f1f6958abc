"""Fast adaptive multitask optimization."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.support.dtypes import falls_below
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights
from fastmtl.weighting.rules import Adam, counted, even_fall, even_fall_slope

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

    def init_param(self) -> None:
        """Create the logits xi and their optimizer."""
        self.remember("min_losses", torch.zeros(self.task_num))
        self.logits = Adam(self, "famo", torch.zeros(self.task_num))

    def weigh(self, losses: Tensor, gram: None, **hyper: object) -> Weights:
        """Return the derivatives of ``sum_t z_t log D_t / c``."""
        self._excess = losses - self.min_losses
        return Weights(shared=even_fall(self.logits.value, self._excess), known=counted(self._excess))

    def refused(self, losses: Tensor, **hyper: object) -> Tensor:
        """Return which losses are below their bounds."""
        return falls_below(losses, self.min_losses)

    def after_step(
        self, losses: Tensor, *, FAMO_w_lr: float = 0.025, FAMO_w_gamma: float = 1e-3, **hyper: object
    ) -> None:
        """Move the logits by how much each loss fell."""
        slope = even_fall_slope(self.logits.value, self._excess, losses - self.min_losses)
        self.logits.step(slope, lr=FAMO_w_lr, weight_decay=FAMO_w_gamma, known=counted(self._excess))
