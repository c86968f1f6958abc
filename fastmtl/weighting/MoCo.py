"""Multi-objective gradient correction."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Rows, Weights
from fastmtl.weighting.row_state import RowState

__all__ = ["MoCo"]


class MoCo(AbsWeighting):
    """MoCo: moving averages y_t of the normalised task gradients, combined by slowly learned min-norm weights.

    In step k: ``y_t += beta / k^beta_sigma (L_t g_t / |g_t| - y_t)``,
    ``lambda = softmax(lambda - gamma / k^gamma_sigma (Y Y^T + rho I) lambda)``; the update is ``Y^T lambda``.

    Source: Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Stochastic
    Approach", ICLR 2023.
    """

    needs = "rows"
    needs_losses = "non-negative"
    use_of_losses = "it gives the gradients their lengths"
    allows_rep_grad = False
    hyper = {  # noqa: RUF012
        "MoCo_beta": Hyper(type=float, default=0.5, least=0.0, help="Learning rate of the averages."),
        "MoCo_beta_sigma": Hyper(type=float, default=0.5, least=0.0, help="Power of the step by which it falls."),
        "MoCo_gamma": Hyper(type=float, default=0.1, least=0.0, help="Learning rate of the weights."),
        "MoCo_gamma_sigma": Hyper(type=float, default=0.5, least=0.0, help="Power of the step by which it falls."),
        "MoCo_rho": Hyper(type=float, default=0.0, least=0.0, help="Regularization of the weights."),
    }

    lambd: Tensor
    steps: Tensor

    def init_param(self) -> None:
        """Create the averages, the weights and the count of steps."""
        self.averages = RowState(self, "y")
        self.remember("lambd", torch.full((self.task_num,), 1 / self.task_num))
        self.remember("steps", torch.zeros(()))

    def weigh_rows(
        self,
        losses: Tensor,
        rows: Rows,
        *,
        MoCo_beta: float = 0.5,
        MoCo_beta_sigma: float = 0.5,
        MoCo_gamma: float = 0.1,
        MoCo_gamma_sigma: float = 0.5,
        MoCo_rho: float = 0.0,
        **hyper: object,
    ) -> Weights:
        """Return weights of the averages."""
        gram = self.whole(ops.gram(rows))
        keep, gains = ops.moco_rates_(self.steps, losses, gram, MoCo_beta, MoCo_beta_sigma)
        averages = self.averages.rows
        products = self.whole(ops.ema_gram_(averages, rows, keep, gains))
        shared = ops.moco_step_(self.lambd, products, self.steps, MoCo_gamma, MoCo_gamma_sigma, MoCo_rho)
        return Weights(shared=shared, rows=averages, gram=gram)
