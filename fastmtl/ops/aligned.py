"""Weights of the task gradients after their system was aligned to condition number one: Aligned-MTL."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._eigh import Scale, balance
from fastmtl.ops._square import check_gram, check_vector, declare_solver, solved

__all__ = ["aligned"]


def _aligned_form(gram: Tensor, preference: Tensor | None = None, scale: Scale = "min") -> Tensor:
    transformation = balance(gram, scale)
    return transformation.sum(dim=1) if preference is None else transformation @ preference


_aligned = declare_solver("aligned", "(Tensor gram) -> Tensor", check=check_gram, solve=_aligned_form)


def aligned(gram: Tensor, preference: Tensor | None = None, scale: Scale = "min") -> Tensor:
    """Return Aligned-MTL's weights w of T gradients, with which w^T J is the sum of the aligned gradients.

    With the eigenvalues lambda_k and eigenvectors v_k of G, the matrix of aligned gradients B J has the Gram matrix
    min(lambda) I on their span, so that no task dominates and none opposes another; w adds them up:

        w = B 1,   B = sqrt(min(lambda)) sum_k v_k v_k^T / sqrt(lambda_k).

    Only eigenvalues above T 2^-23 max(lambda) count, in the sum and in the minimum: float32 gradients determine no
    smaller ones. Without smaller ones, w^T G w = T min(lambda) and G^(1/2) w = sqrt(min(lambda)) 1, up to 1e-9 of the
    largest entry on the right. The weights do not change when G is scaled. If G is zero, so are the weights.

    Args:
        gram: (T, T) Gram matrix, or (L, T, T) those of L groups of parameters, for (L, T).
        preference: (T,), or (L, T), weights of the aligned gradients in place of ones. With it, or with another
            ``scale``, the closed form is computed by plain operators on the CPU.
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
    wanted = torch.ones_like(gram[..., 0]) if preference is None else preference
    return solved(_aligned_form, gram.shape[:-1], gram, wanted, scale)
