"""The dtype sums and solvers work in, and what rounding does to a loss."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["falls_below", "wide_dtype"]

_ROUNDING = 1e-5


def falls_below(losses: Tensor, bound: Tensor | float) -> Tensor:
    """Return which losses are below a bound by more than rounding.

    A divergence near its optimum, or one minus a cosine, rounds to numbers such as -1e-7 that stand for 0.
    """
    return losses < bound - max(_ROUNDING, torch.finfo(losses.dtype).eps)


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, the one device without it."""
    return torch.float32 if device.type == "mps" else torch.float64
