"""Group optimization for multi-task alignment."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper
from fastmtl.weighting.base import AbsWeighting, Weights
from fastmtl.weighting.kmeans import cluster_means

__all__ = ["GO4Align"]


class GO4Align(AbsWeighting):
    """GO4Align: tasks at a similar stage form a group and share one weight.

    The indicator of task t is ``q_t sum(L) / L_t``: the ratio brings all losses to one scale, the probabilities
    ``q_t <- q_t exp(-step_size L_t)``, divided by their sum, remember the risks so far. The indicators are clustered
    (k-means), and each task has the mean indicator of its group as its weight.

    Source: Shen et al., "GO4Align: Group Optimization for Multi-Task Alignment", NeurIPS 2024.
    """

    hyper = {  # noqa: RUF012
        "GO4Align_groups": Hyper(type=int, default=2, help="Number of groups."),
        "GO4Align_step_size": Hyper(
            type=float, default=1e-4, least=0.0, help="How fast the probabilities follow the losses."
        ),
    }

    probabilities: Tensor

    def init_param(self) -> None:
        """Create the probabilities."""
        self.remember("probabilities", torch.full((self.task_num,), 1 / self.task_num))

    def start_epoch(self, *, GO4Align_groups: int = 2, **hyper: object) -> None:
        """Refuse a number of groups below one.

        Raises:
            UsageError: Says what was given.
        """
        if GO4Align_groups < 1:
            raise UsageError(f"GO4Align_groups must be at least 1, got {GO4Align_groups}.")

    def weigh(
        self, losses: Tensor, gram: None, *, GO4Align_groups: int = 2, GO4Align_step_size: float = 1e-4, **hyper: object
    ) -> Weights:
        """Return each group's mean indicator."""
        risk = self.probabilities * torch.exp(-GO4Align_step_size * losses)
        self.probabilities.copy_(risk / risk.sum())
        indicator = self.probabilities * losses.sum() / losses
        return Weights(shared=cluster_means(indicator, GO4Align_groups).to(losses.dtype))
