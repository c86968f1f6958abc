"""Gradient normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights
from fastmtl.weighting.rules import counted

__all__ = ["GradNorm"]


class GradNorm(AbsWeighting):
    """GradNorm: learned weights that bring the weighted gradient norms to the mean, more for tasks that train slowly.

    ``w = T softmax(loss_scale)`` from the second epoch on, ones in the first. With ``n_t = w_t |g_t|``, m their mean
    and ``r_t`` the loss relative to that of the first epoch, divided by the mean of these, the parameter ``loss_scale``
    minimises ``sum_t |n_t - m r_t^alpha|``, in which m and r count as constants. A task whose loss was 0 throughout the
    first epoch has ``r_t = 1``.

    Source: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
    ICML 2018.
    """

    needs = "gram"
    needs_losses = "non-negative"
    against_groups = "it learns one weight for each task"
    use_of_losses = "it compares them by their ratios"
    hyper = {  # noqa: RUF012
        "alpha": Hyper(type=float, default=1.5, help="How strongly slowly training tasks are favoured.")
    }

    first_losses: Tensor

    def init_param(self) -> None:
        """Create ``loss_scale`` and the losses of the first epoch."""
        self.loss_scale = nn.Parameter(torch.ones(self.task_num))
        self.remember("first_losses", torch.ones(self.task_num))

    def start_epoch(self, **hyper: object) -> None:
        """Store the losses of the first epoch once it is over."""
        if self.epoch >= 1:
            self.first_losses.copy_(torch.from_numpy(self.train_loss_buffer[:, 0]))

    def weigh(self, losses: Tensor, gram: Tensor, *, alpha: float = 1.5, **hyper: object) -> Weights:
        """Return the weights of the norms' balance and the gradient of ``loss_scale``."""
        if self.epoch < 1:
            return Weights(shared=torch.ones_like(losses))
        share = torch.softmax(self.loss_scale.detach(), dim=-1)
        weights = self.task_num * share
        norms = gram.diagonal().clamp(min=0).sqrt().to(weights.dtype)
        known = counted(self.first_losses)
        rate = torch.where(known, losses.clamp(min=0) / self.first_losses, 0.0)
        mean = rate.sum() / known.sum()
        relative = torch.where(known & (mean > 0), rate / mean, 1.0)
        target = (weights * norms).mean() * relative**alpha
        slope = torch.sign(weights * norms - target) * norms
        return Weights(shared=weights, own_grads={"loss_scale": weights * (slope - share @ slope)})
