"""Orders in which the tests of gradient surgery visit tasks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["others", "permutations"]


def permutations(size: int, seed: int = 0) -> Tensor:
    """Return a random order of all tasks for each task, itself among them."""
    return torch.rand(size, size, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)


def others(size: int, seed: int = 0) -> Tensor:
    """Return a random order of all other tasks for each task."""
    orders = permutations(size, seed)
    return orders[orders != torch.arange(size)[:, None]].view(size, size - 1)
