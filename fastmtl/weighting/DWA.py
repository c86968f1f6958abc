"""Dynamic weight average."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights
from fastmtl.weighting.rules import descent_rates

__all__ = ["DWA"]


class DWA(AbsWeighting):
    """Dynamic Weight Average: tasks whose loss falls slowly get more weight.

    From the third epoch on ``w = T_tasks softmax(r / T)`` with r_t the ratio of the mean training losses of the last
    two epochs; ones before, and 1 for a task whose loss was 0 in the first of the two.

    Source: Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019.
    """

    reads_losses = False
    needs_losses = "non-negative"
    use_of_losses = "it compares them by their ratios"
    hyper = {  # noqa: RUF012
        "T": Hyper(type=float, default=2.0, above=0, help="Temperature: the higher, the more equal the weights.")
    }

    epoch_weights: Tensor

    def init_param(self) -> None:
        """Create the weights of the epoch."""
        self.remember("epoch_weights", torch.ones(self.task_num))

    def start_epoch(self, *, T: float = 2.0, **hyper: object) -> None:
        """Compute the weights of the epoch from the losses of the last two."""
        if self.epoch > 1:
            losses = torch.from_numpy(self.train_loss_buffer)
            self.epoch_weights.copy_(descent_rates(losses[:, self.epoch - 1], losses[:, self.epoch - 2], T))

    def weigh(self, losses: Tensor, gram: None, **hyper: object) -> Weights:
        """Return the weights of the epoch."""
        return Weights(shared=self.epoch_weights.clone())
