"""Weights whose combination has the same cosine with all task gradients: ConFIG."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.ops._eigh import equal_projection
from fastmtl.ops._square import check_gram, check_vector, declare_solver, solved

__all__ = ["config"]


def _config_form(gram: Tensor, target: Tensor | None = None) -> Tensor:
    inverse, weight, image = equal_projection(gram, target)
    square = weight @ image
    if square <= 0:
        return torch.zeros_like(weight)
    projected = gram.diagonal().clamp(min=0).sqrt() @ image
    return weight * inverse * (projected / square)


_config = declare_solver("config", "(Tensor gram) -> Tensor", check=check_gram, solve=_config_form)


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
        gram: (T, T) Gram matrix, or (L, T, T) those of L groups of parameters, for (L, T).
        preference: (T,), or (L, T), numbers that the cosines of the update are to be proportional to: x = pinv(C)
            preference. Equal ones if None. With it, the closed form is computed by plain operators on the CPU.

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
    return solved(_config_form, gram.shape[:-1], gram, preference)
