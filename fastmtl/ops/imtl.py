"""Weights whose combination projects equally onto all task gradients: IMTL-G."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.ops._eigh import COSINE_TOLERANCE, equal_projection
from fastmtl.ops._square import check_gram, declare_solver

__all__ = ["imtl"]


def _imtl_form(gram: Tensor) -> Tensor:
    size = len(gram)
    inverse, weight, _ = equal_projection(gram)
    weight = weight * inverse
    total = weight.sum()
    if abs(total) > size * COSINE_TOLERANCE * weight.abs().sum():
        return weight / total
    return inverse / inverse.sum() if inverse.any() else torch.full_like(inverse, 1 / size)


_imtl = declare_solver("imtl", "(Tensor gram) -> Tensor", check=check_gram, solve=_imtl_form)


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
