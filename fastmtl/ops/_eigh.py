"""What the references of the spectral solvers share: eigenvalues that float32 gradients support, equal projections."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COSINE_TOLERANCE", "equal_projection"]

# Float32 gradients leave a cosine uncertain by this, an eigenvalue of T x T cosines by T times as much at most.
COSINE_TOLERANCE = 2.0**-23


def equal_projection(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the direction onto which the unit gradients project equally.

    Args:
        gram: (T, T) finite float64 Gram matrix on the CPU.

    Returns:
        ``(inverse, weight, image)``, each (T,) and zero for gradients of length zero: 1 / d with d_i = sqrt(G_ii), the
        weights x = pinv(C) 1 of the unit gradients with C = G / (d d^T), and C x. Eigenvalues of C up to T 2^-23 count
        as zero; where the ones lie in the space of those, x is zero.
    """
    size = len(gram)
    length = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)
    ones = (length > 0).double()
    value, vector = torch.linalg.eigh(inverse[:, None] * gram * inverse)
    kept = value > size * COSINE_TOLERANCE
    value, vector = value[kept], vector[:, kept]
    part = vector.T @ ones
    if part.square().sum() <= size * COSINE_TOLERANCE * ones.sum():
        return inverse, torch.zeros_like(ones), torch.zeros_like(ones)
    return inverse, vector @ (part / value), vector @ part
