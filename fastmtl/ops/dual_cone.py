"""Projections onto the dual cone of the task gradients, from their Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._square import check_gram, declare_solver
from fastmtl.ops.nonneg_qp import least_on_cosines

__all__ = ["dual_cone"]


def _check(gram: Tensor, targets: Tensor) -> None:
    check_gram(gram)
    size, groups = gram.shape[-1], gram.shape[:-2]
    fits = (
        targets.dim() - len(groups) in (1, 2) and targets.shape[: len(groups)] == groups and targets.shape[-1] == size
    )
    if not fits or not targets.is_floating_point():
        each = "".join(f"{count}, " for count in groups)
        one = f"({each}{size})" if groups else f"({size},)"
        raise UsageError(
            f"targets must be a {one} or ({each}M, {size}) tensor of floats, one column per row of gram, "
            f"got shape {tuple(targets.shape)} and dtype {targets.dtype}."
        )
    if targets.device != gram.device:
        raise UsageError(f"targets must be on gram's device {gram.device}, got {targets.device}.")


def _project_all(gram: Tensor, targets: Tensor) -> Tensor:
    rows = [_project(gram, target) for target in targets.reshape(-1, len(gram))]
    return torch.stack(rows).view(targets.shape) if rows else torch.empty_like(targets)


def _project(gram: Tensor, target: Tensor) -> Tensor:
    """Return v by way of z = (v - u) d / m, d_i = sqrt(G_ii) and m = sum(|u| d): the right side is -C (d u) / m."""
    if not target.isfinite().all():
        return torch.full_like(target, torch.nan)
    length = gram.diagonal().clamp(min=0).sqrt()
    moving = (length > 0).nonzero()[:, 0]
    unit = target[moving].abs().max() if len(moving) else target.new_zeros(())
    if unit == 0:
        return target.clone()
    length = length[moving]
    scaled = target[moving] / unit * length
    mass = scaled.abs().sum()
    cosine = gram[moving][:, moving] / length[:, None] / length
    point = least_on_cosines(cosine, -cosine @ (scaled / mass))
    weights = target.clone()
    weights[moving] += point / length * mass * unit
    return weights


_dual_cone = declare_solver(
    "dual_cone",
    "(Tensor gram, Tensor targets) -> Tensor",
    check=_check,
    solve=_project_all,
    shape=lambda gram, targets: targets.shape,
)


def dual_cone(gram: Tensor, targets: Tensor) -> Tensor:
    """Return, for each target u, the weights v that minimise v^T G v over v >= u (elementwise).

    J^T v is the projection of J^T u onto the dual cone of the rows of J, the vectors that conflict with no gradient.
    UPGrad projects each task's share of the weight, ``targets = torch.diag(preference)``, and adds up the rows of the
    result; DualProj projects the weighted sum, ``targets = preference``.

    With s = sum_j sqrt(G_jj) (|u_j| + v_j - u_j), for every task i

        v_i >= u_i,   (G v)_i >= -1e-12 s sqrt(G_ii),   and (G v)_i <= 1e-12 s sqrt(G_ii) where v_i > u_i,

    up to rounding of v. Rows of length zero keep v_i = u_i. A NaN or infinity in u makes the weights of its row NaN.

    Args:
        gram: (T, T) Gram matrix, or (L, T, T) those of L groups of parameters.
        targets: (M, T) or (T,) weights of the vectors to project, one per row, of any sign, with L groups (L, M, T) or
            (L, T); the result has this shape.

    Source:
        Quinton and Rey, "Jacobian descent for multi-objective optimization", 2024; Lawson and Hanson, "Solving least
        squares problems", 1974.

    Example:
        >>> dual_cone(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]), torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
        tensor([[0.5000, 0.1250],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    return _dual_cone(gram, targets)
