"""Quadratic programs over the nonnegative orthant, from a Gram matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmtl.ops._square import check_gram, check_vector, declare_solver

__all__ = ["RIDGE", "least_on_cosines", "nonneg_qp", "shrink_support"]

# Makes cosines definite; the guarantees' 1e-12 pays for it.
RIDGE = 2.0**-42


def _check(gram: Tensor, linear: Tensor) -> None:
    check_gram(gram)
    check_vector("linear", linear, gram)


def least_on_cosines(cosine: Tensor, linear: Tensor) -> Tensor:
    """Return the z >= 0 that minimises ``1/2 z^T C z - b^T z``, by Lawson and Hanson's method from an empty support.

    C is positive semidefinite with ones on the diagonal, the entries of b are in [-1, 1].
    """
    matrix = cosine + RIDGE * torch.eye(len(linear), dtype=cosine.dtype)
    point = torch.zeros_like(linear)
    support: list[int] = []
    for _ in range(8 * len(linear) + 32):
        slope = linear - matrix @ point
        slope[support] = -torch.inf
        entering = int(slope.argmax())
        if slope[entering] <= 0.25 * RIDGE * (1 + point.sum()):
            break
        support.append(entering)
        shrink_support(point, support, lambda at: torch.linalg.solve(matrix[at][:, at], linear[at]))
    return point


def shrink_support(point: Tensor, support: list[int], minimiser: Callable[[list[int]], Tensor]) -> None:
    """Move a point to the minimiser on its support, which tasks leave whose entries would become negative.

    Point and support are changed in place; the minimiser on a support may have any sign.
    """
    while support:
        target, inside = minimiser(support), point[support]
        if (target > 0).all():
            point[support] = target
            return
        ratio = torch.where(target > 0, torch.inf, inside / (inside - target)).nan_to_num(0, torch.inf)
        blocking = int(ratio.argmin())
        point[support] = (inside + ratio[blocking] * (target - inside)).clamp(min=0)
        point[support.pop(blocking)] = 0


def _solve(gram: Tensor, linear: Tensor) -> Tensor:
    solution = torch.zeros_like(linear)
    moving = (gram.diagonal() > 0).nonzero()[:, 0]
    if not linear.isfinite().all():
        solution.fill_(torch.nan)
    elif len(moving) > 0:
        length = gram.diagonal()[moving].sqrt()
        scaled = linear[moving] / length
        unit = scaled.abs().max()
        if unit > 0:
            cosine = gram[moving][:, moving] / length[:, None] / length
            solution[moving] = least_on_cosines(cosine, scaled / unit) / length * unit
    return solution


_nonneg_qp = declare_solver("nonneg_qp", "(Tensor gram, Tensor linear) -> Tensor", check=_check, solve=_solve)


def nonneg_qp(gram: Tensor, linear: Tensor) -> Tensor:
    """Return the y >= 0 (elementwise) that minimises ``1/2 y^T G y - b^T y``.

    With d_i = sqrt(G_ii) and s = max_i |b_i| / d_i + sum_j d_j y_j, for every i with d_i > 0

        y_i >= 0,   (G y - b)_i >= -1e-12 s d_i,   and (G y - b)_i <= 1e-12 s d_i where y_i > 0.

    Where d_i is zero, y_i is. Where the objective has no minimum (G is zero along a direction in which b^T y grows), y
    is finite but huge; this shows in (G y - b)_i max_j(d_j y_j) / (s d_i), which is then below -1e-12 for some i. A NaN
    or infinity in b gives NaN too.

    Args:
        gram: (T, T) Gram matrix, or (L, T, T) those of L groups of parameters, for (L, T).
        linear: (T,), or (L, T), the numbers b.

    Source:
        Lawson and Hanson, "Solving least squares problems", 1974.

    Example:
        >>> nonneg_qp(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, -1.0]))
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    return _nonneg_qp(gram, linear)
