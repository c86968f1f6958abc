"""Weights of an update whose norm is limited."""

from __future__ import annotations

from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._registry import declare
from fastmtl.ops._square import check_gram, check_vector
from fastmtl.support.dtypes import wide_dtype

__all__ = ["cap_norm"]


def _check(gram: Tensor, weights: Tensor, max_norm: float) -> None:
    check_gram(gram)
    check_vector("weights", weights, gram)
    if not max_norm > 0:
        raise UsageError(f"max_norm must be above 0, got {max_norm}.")


def _reference(gram: Tensor, weights: Tensor, max_norm: float) -> Tensor:
    wide = wide_dtype(gram.device)
    numbers = weights.detach().to(wide)
    square = (numbers[..., None, :] @ gram.detach().to(wide) @ numbers[..., None]).sum()
    return numbers * (max_norm / (square.clamp(min=0).sqrt() + 1e-6)).clamp(max=1)


_cap_norm = declare(
    "cap_norm",
    "(Tensor gram, Tensor weights, float max_norm) -> Tensor",
    check=_check,
    reference=_reference,
    fake=lambda gram, weights, max_norm: gram.new_empty(weights.shape, dtype=wide_dtype(gram.device)),
)


def cap_norm(gram: Tensor, weights: Tensor, max_norm: float) -> Tensor:
    """Return weights times ``min(1, max_norm / (|w^T J| + 1e-6))``, so that the update has at most that norm.

    Args:
        gram: (T, T) Gram matrix G; the norm is the root of ``w^T G w``, for those of L groups of parameters (L, T, T)
            that of the sum of all ``w^T G w``.
        weights: (T,), or (L, T).
        max_norm: The greatest norm, above 0.

    Example:
        >>> cap_norm(torch.eye(2), torch.tensor([3.0, 4.0]), 1.0)
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    return _cap_norm(gram, weights, max_norm)
