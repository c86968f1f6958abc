"""Dual-balancing multi-task learning."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Rows, Weights
from fastmtl.weighting.row_state import RowState
from fastmtl.weighting.rules import counted

__all__ = ["DB_MTL"]


class DB_MTL(AbsWeighting):
    """Dual-Balancing: log losses, and moving averages of their gradients brought to the length of the longest.

    In step k with ``b = beta / k^beta_sigma``: ``y_t = b y_t + (1 - b) g_t / L_t``; the update is
    ``sum_t (max_s |y_s| / |y_t|) y_t``. Decoders follow the log losses. A loss of 0 takes no part in a step.

    Source: Lin et al., "Dual-Balancing for Multi-Task Learning", 2023.
    """

    needs = "rows"
    needs_losses = "positive"
    use_of_losses = "it takes their logarithms"
    weighs_heads = True
    allows_rep_grad = False
    hyper = {  # noqa: RUF012
        "DB_beta": Hyper(type=float, default=0.9, least=0.0, help="Decay of the averages."),
        "DB_beta_sigma": Hyper(type=float, default=0.0, least=0.0, help="Power of the step by which it falls."),
    }

    steps: Tensor

    def init_param(self) -> None:
        """Create the averages and the count of steps."""
        self.averages = RowState(self, "grad_buffer")
        self.remember("steps", torch.zeros(()))

    def weigh_rows(
        self, losses: Tensor, rows: Rows, *, DB_beta: float = 0.9, DB_beta_sigma: float = 0.0, **hyper: object
    ) -> Weights:
        """Return weights of the averages."""
        self.steps.add_(1)
        decay = DB_beta / self.steps**DB_beta_sigma
        known = counted(losses)
        heads = torch.where(known, 1 / (losses + 1e-8), 0.0)
        averages = self.averages.rows
        keep = torch.where(known, decay, 1.0)
        gram = self.whole(ops.ema_gram_(averages, rows, keep, (1 - decay) * heads))
        length = torch.where(known, gram.diagonal().sqrt(), 0.0)
        shared = torch.where(known, length.max() / (length + 1e-8), 0.0)
        return Weights(shared=shared, heads=heads, rows=averages, gram=gram, known=known)
