"""Robust multi-task learning with excess risks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Rows, Weights
from fastmtl.weighting.row_state import RowState
from fastmtl.weighting.rules import raised

__all__ = ["ExcessMTL"]


class ExcessMTL(AbsWeighting):
    """ExcessMTL: tasks far from their optimum get more weight, however noisy their labels.

    The excess risk of task t is estimated as ``g_t^T diag(h_t)^(-1/2) g_t`` with h_t the sum of the squared gradients
    so far, relative to that of the task's first step with a gradient; weights grow by
    ``exp(robust_step_size excess_t)`` and sum to T.

    Source: He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024.
    """

    needs = "rows"
    weighs_heads = True
    allows_rep_grad = False
    hyper = {  # noqa: RUF012
        "robust_step_size": Hyper(type=float, default=1e-2, least=0.0, help="Learning rate of the weights.")
    }

    loss_weight: Tensor
    initial_w: Tensor

    def init_param(self) -> None:
        """Create the sums of squares, the first step's risks and the weights."""
        self.squares = RowState(self, "grad_sum")
        self.remember("loss_weight", torch.ones(self.task_num))
        self.remember("initial_w", torch.zeros(self.task_num))

    def weigh_rows(self, losses: Tensor, rows: Rows, *, robust_step_size: float = 1e-2, **hyper: object) -> Weights:
        """Return the grown weights, of decoders too."""
        risk = self.whole(ops.excess_risk_(self.squares.rows, rows)).to(losses.dtype)
        known = self.initial_w != 0
        relative = torch.where(known, risk / torch.where(known, self.initial_w, 1.0), 0.0)
        self.initial_w.copy_(torch.where(known, self.initial_w, risk))
        grown = self.task_num * raised(self.loss_weight, relative, robust_step_size)
        self.loss_weight.copy_(torch.where(known.any(), grown, self.loss_weight))
        weights = self.loss_weight.clone()
        return Weights(shared=weights, heads=weights)
