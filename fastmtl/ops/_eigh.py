"""What the references of the spectral solvers share: eigenvalues that float32 gradients support, equal projections."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["COSINE_TOLERANCE", "Scale", "balance", "equal_projection"]

Scale = Literal["min", "median", "rmse"]

# Float32 gradients leave a cosine uncertain by this, an eigenvalue of T x T cosines by T times as much at most.
COSINE_TOLERANCE = 2.0**-23


def balance(gram: Tensor, scale: Scale = "min") -> Tensor:
    """Return Aligned-MTL's (T, T) transformation B = sqrt(s) sum_k v_k v_k^T / sqrt(lambda_k), zero if G is.

    Eigenvalues up to T 2^-23 max(lambda) do not count; s is the smallest one, the median or, for ``"rmse"``, the mean.
    """
    value, vector = torch.linalg.eigh(gram)
    kept = value > len(gram) * COSINE_TOLERANCE * value.max().clamp(min=0)
    if not kept.any():
        return torch.zeros_like(gram)
    value, vector = value[kept], vector[:, kept]
    size = {"min": value.min, "median": value.median, "rmse": value.mean}[scale]()
    return (vector * (size / value).sqrt()) @ vector.T


def equal_projection(gram: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the direction onto which the unit gradients project equally, or in proportion to a (T,) ``target``.

    It is given by 1 / d with d_i = sqrt(G_ii), the weights x = pinv(C) target of the unit gradients with
    C = G / (d d^T), and C x, each (T,) and zero for gradients of length zero. Eigenvalues of C up to T 2^-23 count as
    zero; where the target lies in the space of those, x is zero.
    """
    size = len(gram)
    length = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(length > 0, 1 / length, 0.0)
    wanted = torch.where(length > 0, 1.0 if target is None else target, 0.0).double()
    value, vector = torch.linalg.eigh(inverse[:, None] * gram * inverse)
    kept = value > size * COSINE_TOLERANCE
    value, vector = value[kept], vector[:, kept]
    part = vector.T @ wanted
    if part.square().sum() <= size * COSINE_TOLERANCE * wanted.square().sum():
        return inverse, torch.zeros_like(wanted), torch.zeros_like(wanted)
    return inverse, vector @ (part / value), vector @ part
