"""FairGrad's alpha-fair weights, from the Gram matrix of the task gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._square import check_warm, declare_solver

__all__ = ["fairgrad"]


_RIDGE = 1e-10


def _check(gram: Tensor, alpha: float, warm_start: Tensor | None = None) -> None:
    check_warm(gram, warm_start)
    if not 0 < alpha < math.inf:
        raise UsageError(f"alpha must be positive and finite, got {alpha}.")


def fair_weights(gram: Tensor, power: float) -> Tensor:
    """Return w > 0 with G w = w^-power, for G with its ridge, by Newton's method with a line search.

    It works on u, the weights in units of those that each task would have alone, G_ii^(-1 / (power + 1)). With
    e_i = G_ii^((power - 1) / (2 power + 2)) and the cosines C of the gradients, the objective is
    1/2 (e u)^T C (e u) - sum e_i^2 phi(u_i), phi' = u^-power.
    """
    square = gram.diagonal()
    kept = (square > 0).nonzero().flatten()
    weights = torch.zeros_like(square)
    if len(kept) == 0:
        return weights
    square = square[kept]
    cosine = (gram[kept][:, kept] * square.rsqrt()[:, None] * square.rsqrt()).clamp(-1, 1)
    cosine.fill_diagonal_(1)
    identity = torch.eye(len(kept), dtype=gram.dtype)
    ridge = _RIDGE
    while torch.linalg.cholesky_ex(cosine + 0.5 * ridge * identity).info > 0:
        ridge *= 10
    cosine += ridge * identity

    unit = square ** (0.5 * (power - 1) / (power + 1))
    unit /= unit.max()
    point = torch.ones_like(square)
    point *= ((unit @ unit) / (unit @ cosine @ unit)) ** (1 / (1 + power))
    for _ in range(300):
        pull, image = unit * point**-power, cosine @ (unit * point)
        rounding = cosine.abs() @ (unit * point)
        if ((pull - image).abs() <= 1e-11 * pull + 1e-15 * rounding).all():
            break
        # Rows that are far too large take the secant to where they meet their image: Newton's step would miss by far.
        far = image > 1.01 * pull
        target = torch.where(far, image, 2 * pull)
        secant = (target - pull) / (1 - ((pull / target) ** (1 / power)).clamp(min=1e-6))
        curvature = torch.where(far, secant, power * pull) / (unit * point)
        # Row i divided by sqrt(1 + curvature_i), column too: a matrix with unit diagonal, whatever the scales.
        scale = (cosine.diagonal() + curvature).rsqrt()
        system = scale[:, None] * cosine * scale + torch.diag(scale * curvature * scale)
        step = scale * torch.linalg.solve(system, scale * (pull - image)) / unit
        point = point + _step_length(cosine, unit, point, step, power) * step
    weights[kept] = point * square ** (-1 / (1 + power))
    return weights


def _step_length(cosine: Tensor, unit: Tensor, point: Tensor, step: Tensor, power: float) -> float:
    """Return where the slope along the step is about zero, by doubling and bisection."""
    # Row by row: the terms of a row nearly cancel, and rows differ by orders of magnitude.
    image, image_step = cosine @ (unit * point), cosine @ (unit * step)
    first = float((unit * step) @ (image - unit * point**-power))
    low, high = 0.0, float(torch.where(step < 0, -point / step, torch.inf).min())
    length = min(1.0, 0.5 * high)
    for _ in range(60):
        pull = unit * (point + length * step).clamp(min=1e-300) ** -power
        slope = float((unit * step) @ (image + length * image_step - pull))
        if abs(slope) <= 0.1 * abs(first):
            return length
        if slope < 0:
            low = length
        else:
            high = length
        length = 0.5 * (low + high) if high < math.inf else 2 * length
    return low


_fairgrad = declare_solver(
    "fairgrad",
    "(Tensor gram, float alpha, Tensor? warm_start=None) -> Tensor",
    check=_check,
    solve=lambda gram, alpha, warm_start=None: fair_weights(gram, 1 / alpha),
)


def fairgrad(gram: Tensor, alpha: float, warm_start: Tensor | None = None) -> Tensor:
    """Return FairGrad's weights w > 0 of T gradients: G w = w^(-1/alpha) elementwise.

    The update d = w^T J maximises sum_t <g_t, d>^(1 - alpha) / (1 - alpha) over |d| <= r, up to its length; alpha = 1
    is proportional fairness (:func:`nash`), and the larger alpha, the more the worst-served task counts.

    Where gradients cancel, as opposite or dependent ones do, no finite w solves this. So what is solved is the equation
    of G' = G + 1e-10 diag(G), a change that scales with each row: it caps the weights (alpha = 1: at
    1e5 sqrt(T / G_ii)) and moves those of a well-conditioned G by about 1e-10 of their size. The residual of every row
    is

        |(G' w)_i w_i^(1/alpha) - 1| <= 1e-10 + 1e-14 w_i^(1/alpha) sum_j |G'_ij| w_j,

    that is 1e-10 unless the row's terms cancel. The bound holds for 0.1 <= alpha <= 5 and rows up to 1e12 apart in
    length; a coarser G gets the least ridge of 1e-9, 1e-8, ... that makes it definite. Beyond, weights stay finite.
    Rows of length zero have weight zero; without them, the other weights are the same.

    Args:
        gram: (T, T) Gram matrix, or (L, T, T) those of L groups of parameters, for (L, T).
        alpha: Fairness, positive and finite.
        warm_start: (T,), or (L, T), weights of an earlier, similar G. Near the solution they save time; elsewhere they
            are not used. The guarantee stays as it is.

    Source:
        Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024.

    Example:
        >>> fairgrad(torch.tensor([[1.0, 0.0], [0.0, 8.0]]), alpha=0.5)
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    return _fairgrad(gram, alpha, warm_start)
