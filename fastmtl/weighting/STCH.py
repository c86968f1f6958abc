"""Smooth Tchebycheff scalarization."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights
from fastmtl.weighting.rules import counted

__all__ = ["STCH"]


class STCH(AbsWeighting):
    """Smooth Tchebycheff scalarization of the log losses, relative to their averages in the last warm-up epoch.

    Up to epoch ``STCH_warmup_epoch`` the objective is ``sum_t log L_t``; in that epoch the losses are averaged to n.
    From then on it is ``T mu log sum_t exp(log(L_t / n_t) / mu)``. A loss of 0 takes no part in a step.

    Source: Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024.
    """

    needs_losses = "positive"
    use_of_losses = "it takes their logarithms"
    hyper = {  # noqa: RUF012
        "STCH_mu": Hyper(type=float, default=1.0, above=0, help="Smoothing: towards 0 only the worst task counts."),
        "STCH_warmup_epoch": Hyper(
            type=int, default=4, least=0, help="Epoch whose mean losses the later ones are measured in."
        ),
    }

    loss_sum: Tensor
    loss_count: Tensor

    def init_param(self) -> None:
        """Create the sum of the losses and their number."""
        self.remember("loss_sum", torch.zeros(self.task_num))
        self.remember("loss_count", torch.zeros(self.task_num))

    def weigh(
        self, losses: Tensor, gram: None, *, STCH_mu: float = 1.0, STCH_warmup_epoch: int = 4, **hyper: object
    ) -> Weights:
        """Return the derivatives of the scalarization."""
        tiny = 1e-20
        known = counted(losses)
        if self.epoch <= STCH_warmup_epoch:
            if self.epoch == STCH_warmup_epoch:
                self.loss_sum.add_(torch.where(known, losses, 0.0))
                self.loss_count.add_(known)
            return Weights(shared=torch.where(known, 1 / (losses + tiny), 0.0), known=known)
        # A task without labels in the warm-up epoch is measured in units of its first loss after it.
        missing = known & (self.loss_count == 0)
        self.loss_sum.copy_(torch.where(missing, losses, self.loss_sum))
        self.loss_count.add_(missing)
        nadir = self.loss_sum / self.loss_count
        level = torch.where(known, torch.log(losses / nadir + tiny) / STCH_mu, -torch.inf)
        weights = known.sum() * torch.softmax(level, dim=-1) / (losses + tiny * nadir)
        return Weights(shared=torch.where(known, weights, 0.0), known=known)
