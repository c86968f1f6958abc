"""Multi-objective gradients with double sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights
from fastmtl.weighting.rules import stepped

__all__ = ["MoDo"]


class MoDo(AbsWeighting):
    """MoDo: min-norm weights learned step by step from two independent batches; a third one gives the update.

    ``w <- project(w - gamma (J_1 J_2^T w + rho w))`` on the simplex. Decoders get the mean over the three batches.

    Source: Chen et al., "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
    Conflict-Avoidance", NeurIPS 2023.
    """

    needs = "gram"
    samples = 3
    weighs_heads = True
    allows_rep_grad = False
    hyper = {  # noqa: RUF012
        "MoDo_gamma": Hyper(type=float, default=1e-3, least=0.0, help="Learning rate of the weights."),
        "MoDo_rho": Hyper(type=float, default=0.1, least=0.0, help="Regularization of the weights."),
    }

    lambd: Tensor

    def init_param(self) -> None:
        """Create the weights."""
        self.remember("lambd", torch.full((self.task_num,), 1 / self.task_num))

    def weigh(
        self, losses: Tensor, gram: Tensor, *, MoDo_gamma: float = 1e-3, MoDo_rho: float = 0.1, **hyper: object
    ) -> Weights:
        """Return weights of the third batch's gradients."""
        size = self.task_num
        cross = gram[:size, size : 2 * size].to(self.lambd.dtype)
        self.lambd.copy_(stepped(self.lambd, cross, MoDo_gamma, MoDo_rho))
        shared = torch.cat([torch.zeros_like(self.lambd).repeat(2), self.lambd])
        return Weights(shared=shared, heads=torch.full_like(shared, 1 / 3), logged=self.lambd.clone())
