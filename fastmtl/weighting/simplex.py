"""The Euclidean projection onto the probability simplex."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["project_simplex"]


def project_simplex(point: Tensor) -> Tensor:
    """Return the nearest (T,) vector that is nonnegative and sums to one.

    Source: Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", ICML 2008.
    """
    # The projection does not change with a shift; without one, the 1 is lost beside entries of 1e8.
    point = point - point.max()
    falling = point.sort(descending=True).values
    position = torch.arange(1, len(point) + 1, dtype=point.dtype, device=point.device)
    thresholds = (falling.cumsum(0) - 1) / position
    # The threshold at the last entry that stays above its own.
    kept = (falling > thresholds).sum().clamp(min=1)
    return (point - thresholds.gather(0, (kept - 1).reshape(1))).clamp(min=0)
