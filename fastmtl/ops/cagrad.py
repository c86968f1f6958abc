"""CAGrad's weights: the conflict-averse direction near the mean gradient, from the tasks' Gram matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._registry import implementation
from fastmtl.ops._square import check_gram, declare_solver

__all__ = ["cagrad", "cagrad_update"]

_ROUNDING = 2.0**-45
_LEAST_C = 1e-8


def _check(gram: Tensor, c: float) -> None:
    check_gram(gram)
    if not 0 <= c < math.inf:
        raise UsageError(f"c must be finite and at least 0, got {c}.")


def _bisect(gram: Tensor, c: float) -> Tensor:
    """Bisect for the shift at which the min-norm element g_w + shift g_0 has |g_w| = shift c |g_0|."""
    size = len(gram)
    length = gram.diagonal().clamp(min=0).sqrt()
    mean = gram.mean(dim=1)
    square = float(mean.mean())
    if square <= _ROUNDING * float(length.mean()) ** 2:
        return torch.full_like(mean, 1 / size)
    if c <= _LEAST_C:
        return torch.nn.functional.one_hot(mean.argmin(), size).double()

    min_norm = implementation("min_norm", "reference")
    radius = c * math.sqrt(square)
    high = math.log(2 * float(length.max()) / radius)
    low = math.log(1e-9 * float(length[length > 0].min()) / radius)
    for _ in range(70):
        shift = math.exp(0.5 * (low + high))
        shifted = gram + shift * (mean[:, None] + mean) + shift * shift * square
        weights: Tensor = min_norm(shifted)
        if float(weights @ gram @ weights) > (radius * shift) ** 2:
            low = math.log(shift)
        else:
            high = math.log(shift)
    still = length == 0
    if still.any() and float(weights @ mean + radius * (weights @ gram @ weights).clamp(min=0).sqrt()) >= 0:
        # F is 0 at a row of zeros, which the shifts above only come near to.
        return still / still.sum(dtype=weights.dtype)
    return weights


_cagrad = declare_solver("cagrad", "(Tensor gram, float c) -> Tensor", check=_check, solve=_bisect)


def _update(gram: Tensor, c: float) -> Tensor:
    weights = _bisect(gram, c)
    size = (weights @ gram @ weights).clamp(min=0).sqrt()
    radius = c * gram.mean().clamp(min=0).sqrt()
    reach = torch.where(size > 0, radius / size, 0.0 * radius)
    return torch.stack([weights, 1 / len(gram) + reach * weights])


_cagrad_update = declare_solver(
    "cagrad_update",
    "(Tensor gram, float c) -> Tensor",
    check=_check,
    solve=_update,
    shape=lambda gram, c: torch.Size((*gram.shape[:-2], 2, gram.shape[-1])),
)


def cagrad(gram: Tensor, c: float) -> Tensor:
    """Return CAGrad's weights w of T gradients: the minimiser on the simplex of F(w) = <g_w, g_0> + c |g_0| |g_w|.

    g_w = sum_t w_t g_t and g_0 is the mean gradient; so F(w) = w^T q + c |g_0| sqrt(w^T G w), q = G 1 / T. The update
    d = g_0 + (c |g_0| / |g_w|) g_w maximises the worst task's improvement min_i <g_i, d> over |d - g_0| <= c |g_0|, and
    that improvement is F(w).

    With the scale s_i = (1 + c) |g_0| (|g_i| + sum_j w_j |g_j|), for every task i

        <g_i, d> >= F(w) - 1e-8 s_i

    for 1e-5 <= c <= 100, |g_0| above 1e-3 of the mean length L of the g_i and |g_w| above 1e-4 sum_j w_j |g_j|. For a
    smaller |g_0|, down to the rounding of G (2e-7 L), that of |g_0|^2 adds 2^-48 (L / |g_0|)^2 s_i. Closer to a w with
    g_w = 0, where d is not determined by w, and for smaller c, F(w) is still within 1e-6 (s . v) of F(v) for every v on
    the simplex. Where |g_0| is rounding, all weights are 1 / T; for c at most 1e-8 the task with the smallest
    <g_i, g_0> has all weight. The weights are nonnegative, have sum one and are those of any multiple of G.

    Args:
        gram: (T, T) Gram matrix, positive semidefinite, or (L, T, T) those of L groups of parameters, for (L, T).
        c: Radius of the ball around the mean gradient in which the update is sought, in units of |g_0|; finite, at
            least 0. Below 1 CAGrad converges to a minimum of the mean loss.

    Source:
        Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021.

    Example:
        >>> cagrad(torch.tensor([[2.0, -1.0], [-1.0, 3.0]]), c=0.5)
        tensor([0.7264, 0.2736], dtype=torch.float64)
    """
    return _cagrad(gram, c)


def cagrad_update(gram: Tensor, c: float) -> Tensor:
    """Return (2, T): CAGrad's weights w, and the coefficients of its update d = g_0 + (c |g_0| / |g_w|) g_w.

    They are as :func:`cagrad` defines them; where g_w is zero the update is g_0. With L groups the result is (L, 2, T).

    Example:
        >>> cagrad_update(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), c=0.4)
        tensor([[1.0000, 0.0000],
                [0.9472, 0.5000]], dtype=torch.float64)
    """
    return _cagrad_update(gram, c)
