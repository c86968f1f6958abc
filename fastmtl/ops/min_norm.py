"""The min-norm element of the convex hull of the task gradients, from their Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.ops._square import check_warm, declare_solver
from fastmtl.ops.nonneg_qp import RIDGE, shrink_support

__all__ = ["min_norm"]


def _wolfe(gram: Tensor, warm_start: Tensor | None = None) -> Tensor:
    """Wolfe's algorithm on the gradients' cosines, each affine minimiser from a bordered linear system.

    It works on v = w d with d_i = sqrt(G_ii), so that the matrix is C = G / (d d^T) plus a ridge, which the guarantee's
    1e-12 s_i pays for, and the constraint sum(w) = 1 is b^T v = 1 with b = min(d) / d.
    """
    size = len(gram)
    zero = gram.diagonal() <= 0
    if zero.any():
        return zero.to(gram.dtype) / zero.sum()
    length = gram.diagonal().sqrt()
    cosine = gram / length[:, None] / length + RIDGE * torch.eye(size, dtype=gram.dtype)
    border = length.min() / length

    point = torch.zeros_like(length)
    support = [int(length.argmin())]
    point[support] = 1
    for _ in range(8 * size + 32):
        image = cosine @ point
        excess = (point @ image) * border - image
        excess[support] = -torch.inf
        entering = int(excess.argmax())
        if excess[entering] <= 0.25 * RIDGE * point.sum():
            break
        support.append(entering)
        shrink_support(point, support, lambda at: _affine_minimiser(cosine[at][:, at], border[at]))
    weights = point * border
    return weights / weights.sum()


def _affine_minimiser(matrix: Tensor, border: Tensor) -> Tensor:
    """Return the v that minimises v^T matrix v under border^T v = 1."""
    size = len(border)
    system = torch.zeros(size + 1, size + 1, dtype=matrix.dtype)
    system[:size, :size] = matrix
    system[:size, size] = system[size, :size] = border
    right = torch.zeros(size + 1, dtype=matrix.dtype)
    right[size] = 1
    return torch.linalg.solve(system, right)[:size]


_min_norm = declare_solver(
    "min_norm", "(Tensor gram, Tensor? warm_start=None) -> Tensor", check=check_warm, solve=_wolfe
)


def min_norm(gram: Tensor, warm_start: Tensor | None = None) -> Tensor:
    """Return the weights w of the shortest convex combination of T gradients: MGDA's minimiser of w^T G w.

    The weights are nonnegative, sum to one, and for every task i

        (G w)_i >= (1 - 1e-6) w^T G w - 1e-12 s_i,   s_i = sqrt(G_ii) sum_j w_j sqrt(G_jj).

    So along the combined gradient d = w^T J every loss decreases at least at the rate |d|^2, up to these tolerances.
    Rows of length zero share the weight equally.

    Args:
        gram: (T, T) Gram matrix, or (L, T, T) those of L groups of parameters, for (L, T).
        warm_start: (T,), or (L, T), weights of an earlier, similar G. The solver starts from the tasks that had weight
            there, which saves time and changes no bound.

    Source:
        Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", 2012; Sener and Koltun,
        "Multi-task learning as multi-objective optimization", NeurIPS 2018; Wolfe, "Finding the nearest point in a
        polytope", 1976.

    Example:
        >>> min_norm(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    return _min_norm(gram, warm_start)
