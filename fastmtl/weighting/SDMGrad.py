"""Stochastic direction-oriented multi-objective gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.hyper import Hyper
from fastmtl.weighting.base import AbsWeighting, Weights
from fastmtl.weighting.simplex import project_simplex

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
        "SDMGrad_lamda": Hyper(type=float, default=0.3, help="Pull towards the average gradient."),
        "SDMGrad_niter": Hyper(type=int, default=20, help="Steps of the solver in each training step."),
    }

    w: Tensor

    def init_param(self) -> None:
        """Create the weights."""
        self.remember("w", torch.full((self.task_num,), 1 / self.task_num))

    def weigh(
        self,
        losses: Tensor,
        gram: Tensor | None,
        *,
        SDMGrad_lamda: float = 0.3,
        SDMGrad_niter: int = 20,
        **hyper: Any,
    ) -> Weights:
        """Return weights of the first batch's gradients."""
        assert gram is not None
        size = self.task_num
        cross = gram[size : 2 * size, 2 * size :].to(self.w.dtype)
        scale = cross.diagonal().clamp(min=0).sqrt().mean()
        cross = cross / (scale**2 + 1e-8)
        pull = SDMGrad_lamda * cross.mean(1)
        weights, velocity = self.w, torch.zeros_like(self.w)
        rate, momentum = 5.0, 0.5
        for _ in range(SDMGrad_niter):
            velocity = momentum * velocity + cross @ weights + pull
            weights = project_simplex(weights - rate * velocity)
        self.w.copy_(weights)
        shared = torch.cat(
            [(weights + SDMGrad_lamda / size) / (1 + SDMGrad_lamda), torch.zeros_like(weights).repeat(2)]
        )
        return Weights(shared=shared, logged=weights)
