"""Stochastic direction-oriented multi-objective gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights
from fastmtl.weighting.rules import directed_weights

__all__ = ["SDMGrad"]


class SDMGrad(AbsWeighting):
    """SDMGrad: min-norm weights regularised towards the average gradient, from two independent batches.

    ``SDMGrad_niter`` steps of projected gradient descent with momentum solve for w; the update is
    ``(sum_t w_t g_t + lamda g0) / (1 + lamda)`` of a third batch, g0 its average gradient.

    Source: Xiao, Ban and Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms",
    NeurIPS 2023.
    """

    needs = "gram"
    samples = 3
    allows_rep_grad = False
    hyper = {  # noqa: RUF012
        "SDMGrad_lamda": Hyper(type=float, default=0.3, least=0.0, help="Pull towards the average gradient."),
        "SDMGrad_niter": Hyper(type=int, default=20, least=1, help="Steps of the solver in each training step."),
    }

    w: Tensor

    def init_param(self) -> None:
        """Create the weights."""
        self.remember("w", torch.full((self.task_num,), 1 / self.task_num))

    def weigh(
        self, losses: Tensor, gram: Tensor, *, SDMGrad_lamda: float = 0.3, SDMGrad_niter: int = 20, **hyper: object
    ) -> Weights:
        """Return weights of the first batch's gradients."""
        size = self.task_num
        cross = gram[size : 2 * size, 2 * size :].to(self.w.dtype)
        equal = torch.full_like(self.w, 1 / size)
        weights = directed_weights(self.w, cross, equal, lamda=SDMGrad_lamda, steps=SDMGrad_niter)
        self.w.copy_(weights)
        update = (weights + SDMGrad_lamda / size) / (1 + SDMGrad_lamda)
        return Weights(shared=torch.cat([update, torch.zeros_like(update).repeat(2)]), logged=weights)
