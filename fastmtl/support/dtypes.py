"""The dtype of sums and solvers, and the rounding errors of losses."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HALF_TYPES", "falls_below", "wide_dtype"]

HALF_TYPES = (torch.bfloat16, torch.float16)

_ROUNDING = 1e-5


def falls_below(losses: Tensor, bound: Tensor | float) -> Tensor:
    """Return which losses are below a bound by more than rounding errors.

    A divergence near its optimum, or one minus a cosine, may round to -1e-7 in place of 0.
    """
    return losses < bound - max(_ROUNDING, torch.finfo(losses.dtype).eps)


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, the one device without it."""
    return torch.float32 if device.type == "mps" else torch.float64
