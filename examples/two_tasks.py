"""The model and data that the examples of other trainers share: a class and a number from the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

__all__ = ["TwoTasks", "data"]


class TwoTasks(nn.Module):
    """A shared network with a classifier and a regression on top."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.classify = nn.Linear(32, 3)
        self.regress = nn.Linear(32, 1)

    def forward(self, inputs: Tensor, label: Tensor, number: Tensor) -> dict[str, Tensor]:
        """Return the loss of each task."""
        features = self.shared(inputs)
        return {
            "class": nn.functional.cross_entropy(self.classify(features), label),
            "number": nn.functional.mse_loss(self.regress(features)[:, 0], number),
        }


def data(count: int = 512, seed: int = 0) -> TensorDataset:
    """Return inputs, classes and numbers."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1), inputs[:, 0] - inputs[:, 3])
