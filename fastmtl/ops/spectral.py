"""Weights in closed form, from the eigenvalues of the Gram matrix or of its cosines: Aligned-MTL, ConFIG and IMTL-G."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._eigh import COSINE_TOLERANCE, Scale, balance, equal_projection
from fastmtl.ops._square import check_gram, check_vector, declare_solver, solved

__all__ = ["aligned", "config", "imtl"]


def _aligned_form(gram: Tensor, preference: Tensor | None = None, scale: Scale = "min") -> Tensor:
    transformation = balance(gram, scale)
    return transformation.sum(dim=1) if preference is None else transformation @ preference


def _config_form(gram: Tensor, target: Tensor | None = None) -> Tensor:
    inverse, weight, image = equal_projection(gram, target)
    square = weight @ image
    if square <= 0:
        return torch.zeros_like(weight)
    projected = gram.diagonal().clamp(min=0).sqrt() @ image
    return weight * inverse * (projected / square)


def _imtl_form(gram: Tensor) -> Tensor:
    size = len(gram)
    inverse, weight, _ = equal_projection(gram)
    weight = weight * inverse
    total = weight.sum()
    if abs(total) > size * COSINE_TOLERANCE * weight.abs().sum():
        return weight / total
    return inverse / inverse.sum() if inverse.any() else torch.full_like(inverse, 1 / size)


_aligned = declare_solver("aligned", "(Tensor gram) -> Tensor", check=check_gram, solve=_aligned_form)
_config = declare_solver("config", "(Tensor gram) -> Tensor", check=check_gram, solve=_config_form)
_imtl = declare_solver("imtl", "(Tensor gram) -> Tensor", check=check_gram, solve=_imtl_form)


def aligned(gram: Tensor, preference: Tensor | None = None, scale: Scale = "min") -> Tensor:
    """Return the weights w of T gradients that Aligned-MTL's aligned gradients amount to.

    With the eigenvalues lambda_k and eigenvectors v_k of G, the matrix of aligned gradients B J has the Gram matrix
    min(lambda) I on their span, so that no task dominates and none opposes another; w adds them up:

        w = B 1,   B = sqrt(min(lambda)) sum_k v_k v_k^T / sqrt(lambda_k).

    Only eigenvalues above T 2^-23 max(lambda) count, in the sum and in the minimum: float32 gradients determine no
    smaller ones. Without smaller ones, w^T G w = T min(lambda) and G^(1/2) w = sqrt(min(lambda)) 1, up to 1e-9 of the
    largest entry on the right. The weights do not change when G is scaled. If G is zero, so are the weights.

    Args:
        gram: (T, T) Gram matrix.
        preference: (T,) weights of the aligned gradients in place of ones. With it, or with another ``scale``, the
            closed form is computed by plain operators on the CPU.
        scale: What the eigenvalues are brought to: the smallest one, their ``"median"`` or, for ``"rmse"``, their mean.

    Source:
        Senushkin, Patakin, Kuznetsov and Konushin, "Independent component alignment for multi-task learning", CVPR
        2023.

    Example:
        >>> aligned(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if scale not in get_args(Scale):
        raise UsageError(f"scale must be one of {', '.join(get_args(Scale))}, got {scale!r}.")
    if preference is None and scale == "min":
        return _aligned(gram)
    check_gram(gram)
    check_vector("preference", preference, gram)
    wanted = torch.ones_like(gram[0]) if preference is None else preference
    return solved(_aligned_form, gram.shape[:1], gram, wanted, scale)


def config(gram: Tensor, preference: Tensor | None = None) -> Tensor:
    """Return the weights w of T gradients whose combination has the same cosine with all of them: ConFIG's update.

    With d_i = sqrt(G_ii), the cosines C = G / (d d^T) and x = pinv(C) 1, the direction is b = sum_i x_i g_i / d_i, and
    the update has its direction and the length sum_i <g_i, b> / |b|:

        w_i = x_i / d_i  (sum_j d_j (C x)_j) / (x^T C x).

    The weights do not change when G is scaled. Along the update the sum of all losses never rises.

    Eigenvalues of C up to T 2^-23 count as zero: cosines of float32 gradients are not known any better. Without such
    ones, all cosines are equal and positive: with p_i = (G w)_i / d_i, the p_i differ by at most 1e-12 sum_j |w_j| d_j.
    With them, they are as equal as least squares makes them. Rows of length zero have weight zero. Where no direction
    has equal positive cosines, as for opposite gradients, all weights are zero.

    Args:
        gram: (T, T) Gram matrix.
        preference: (T,) cosines in proportion to which those of the update shall be, x = pinv(C) preference; equal ones
            if None. With it, the closed form is computed by plain operators on the CPU.

    Source:
        Liu, Chu and Thuerey, "ConFIG: towards conflict-free training of physics informed neural networks", ICLR 2025.

    Example:
        >>> config(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.5000, 0.7500], dtype=torch.float64)
    """
    if preference is None:
        return _config(gram)
    check_gram(gram)
    check_vector("preference", preference, gram)
    return solved(_config_form, gram.shape[:1], gram, preference)


def imtl(gram: Tensor) -> Tensor:
    """Return the weights w of T gradients, summing to one, whose combination projects equally onto all of them: IMTL-G.

    With d_i = sqrt(G_ii), the projections (G w)_i / d_i are the same for all i. In closed form w_i is x_i / d_i,
    divided by their sum, with x as in :func:`config`. The weights do not change when G is scaled. They can be negative,
    as can be their sum before the division: then the update raises all losses alike, as the paper's closed form does.

    Where no eigenvalue counts as zero, the projections differ by at most 1e-12 sum_j |w_j| d_j; else they are as equal
    as least squares makes them. Rows of length zero have weight zero. Where no direction has equal projections other
    than zero, or where the x_i / d_i cancel (their sum is at most T 2^-23 of the sum of their magnitudes), w_i is
    proportional to 1 / d_i, the mean of the unit gradients; and if all rows are zero, it is 1 / T.

    Source:
        Liu, Li, Kuang, Xue, Chen, Yang, Liao and Zhang, "Towards impartial multi-task learning", ICLR 2021.

    Example:
        >>> imtl(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    return _imtl(gram)
