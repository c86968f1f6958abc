"""Gradient normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.weighting.base import AbsWeighting, Hyper, Weights

__all__ = ["GradNorm"]


class GradNorm(AbsWeighting):
    """GradNorm: learned weights that bring the weighted gradient norms to the mean, more for tasks that train slowly.

    ``w = T softmax(loss_scale)`` from the second epoch on, ones in the first. With ``n_t = w_t |g_t|``, m their mean
    and ``r_t`` the loss relative to that of the first epoch, divided by the mean of these, the parameter ``loss_scale``
    minimises ``sum_t |n_t - m r_t^alpha|``, in which m and r count as constants.

    Source: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
    ICML 2018.
    """

    needs = "gram"
    hyper = {  # noqa: RUF012
        "alpha": Hyper(type=float, default=1.5, help="How strongly slowly training tasks are favoured.")
    }

    first_losses: Tensor

    def init_param(self) -> None:
        """Create ``loss_scale`` and the losses of the first epoch."""
        self.loss_scale = nn.Parameter(torch.ones(self.task_num))
        self.remember("first_losses", torch.ones(self.task_num))

    def start_epoch(self, **hyper: object) -> None:
        """Learn the losses of the first epoch once it is over."""
        if self.epoch >= 1:
            self.first_losses.copy_(torch.from_numpy(self.train_loss_buffer[:, 0]))

    def weigh(self, losses: Tensor, gram: Tensor, *, alpha: float = 1.5, **hyper: object) -> Weights:
        """Return the weights and the gradient of ``loss_scale``."""
        if self.epoch < 1:
            return Weights(shared=torch.ones_like(losses))
        share = torch.softmax(self.loss_scale.detach(), dim=-1)
        weights = self.task_num * share
        norms = gram.diagonal().clamp(min=0).sqrt().to(weights.dtype)
        rate = losses / self.first_losses
        target = (weights * norms).mean() * (rate / rate.mean()) ** alpha
        slope = torch.sign(weights * norms - target) * norms
        return Weights(shared=weights, own_grads={"loss_scale": weights * (slope - share @ slope)})
