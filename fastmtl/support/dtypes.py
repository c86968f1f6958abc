"""The dtype sums and solvers work in."""

from __future__ import annotations

import torch

__all__ = ["wide_dtype"]


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, the one device without it."""
    return torch.float32 if device.type == "mps" else torch.float64
