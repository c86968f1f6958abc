"""Networks that look rows up in tables with sparse gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Looking", "heads"]

ROWS = 60


class Looking(nn.Module):
    """Bags, a table of which two look-ups are taken, and one that few rows of a batch look up, in many parts none."""

    def __init__(self, rows: int = ROWS) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(rows, 8, mode="mean", sparse=True)
        self.single = nn.Embedding(rows, 8, sparse=True)
        self.rare = nn.Embedding(rows, 8, sparse=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 37).long() % len(self.single.weight)
        looked = self.bags(ids) + self.single(ids[:, 0]) * self.single(ids[:, 1])
        few = (x[:, 0] > 1).nonzero().squeeze(1)
        if len(few):
            looked = looked.index_add(0, few, self.rare(ids[few, 2]))
        return torch.tanh(self.out(looked))


class LookingHead(nn.Module):
    """A decoder with a table of its own."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(7, 8, sparse=True), nn.Linear(8, outputs)

    def forward(self, rep: Tensor) -> Tensor:
        out: Tensor = self.out(rep + self.table((rep[:, 0].abs() * 97).long() % 7))
        return out


def heads() -> nn.ModuleDict:
    torch.manual_seed(4)
    return nn.ModuleDict({f"task{t}": LookingHead(1 if t % 2 else 3) for t in range(3)}).double()
