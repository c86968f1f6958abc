"""aligned against the reference, the call included."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastmtl.benchmarks.ops._solver import distance_cases
from fastmtl.benchmarks.registry import Case

__all__ = ["cases"]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield Gram matrices of random gradients for all numbers of tasks."""
    return distance_cases("aligned", device, quick)
