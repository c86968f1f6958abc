"""min_norm on Triton, for up to 32 tasks: Wolfe's algorithm in one program for each Gram matrix, in float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl.ops._registry import implementation
from fastmtl.ops._square import check_gram, check_vector

__all__ = ["min_norm", "min_norm_fwd_kernel"]

_MAX_TASKS = 32


@triton.jit
def _invert(matrix: tl.tensor, TASKS: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """Return the inverse of a positive definite matrix: elimination needs no pivoting there."""
    row = tl.arange(0, PADDED)
    inverse = tl.where(row[:, None] == row[None, :], 1.0, 0.0).to(tl.float64)
    for p in range(TASKS):
        here = row[:, None] == p
        line = tl.sum(tl.where(here, matrix, 0.0), axis=0)
        inverse_line = tl.sum(tl.where(here, inverse, 0.0), axis=0)
        pivot = tl.sum(tl.where(row == p, line, 0.0), axis=0)
        column = tl.sum(tl.where(row[None, :] == p, matrix, 0.0), axis=1)
        factor = tl.where(row == p, 1.0 - 1.0 / pivot, column / pivot)
        matrix -= factor[:, None] * line[None, :]
        inverse -= factor[:, None] * inverse_line[None, :]
    return inverse


@triton.jit
def _affine_minimiser(
    cosine: tl.tensor, border: tl.tensor, inside: tl.tensor, TASKS: tl.constexpr, PADDED: tl.constexpr
) -> tl.tensor:
    """Return the v on the tasks inside that minimises v^T cosine v under border^T v = 1.

    It is C^-1 b, scaled. Where C is nearly singular that is far from exact along the near-null vector, which scaling
    undoes, and elsewhere not exact enough, which the residual of C v = lambda b corrects.
    """
    row = tl.arange(0, PADDED)
    taken = inside[:, None] & inside[None, :]
    inverse = _invert(tl.where(taken, cosine, tl.where(row[:, None] == row[None, :], 1.0, 0.0)), TASKS, PADDED)
    right = tl.where(inside, border, 0.0)
    solved = tl.sum(inverse * right[None, :], axis=1)
    solved = solved / tl.sum(right * solved, axis=0)
    point = solved
    for _ in range(3):
        image = tl.sum(cosine * point[None, :], axis=1)
        rest = tl.where(inside, tl.sum(point * image, axis=0) * right - image, 0.0)
        change = tl.sum(inverse * rest[None, :], axis=1)
        point += change - tl.sum(right * change, axis=0) * solved
    return point


@triton.jit
def min_norm_fwd_kernel(
    gram: tl.tensor,
    weights: tl.tensor,
    ridge: tl.float64,
    LIMIT: tl.constexpr,
    TASKS: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """Write the min-norm weights of the Gram matrix of each program.

    It works on v = w d with d_i = sqrt(G_ii): the matrix is C = G / (d d^T) plus a ridge, the constraint b^T v = 1 with
    b = min(d) / d. A minor step that drops a task counts as a step of the loop.
    """
    gram += tl.program_id(0) * TASKS * TASKS
    weights += tl.program_id(0) * TASKS
    task = tl.arange(0, PADDED)
    real = task < TASKS
    both = real[:, None] & real[None, :]
    same = task[:, None] == task[None, :]
    matrix = tl.load(gram + task[:, None] * TASKS + task[None, :], mask=both, other=0.0)
    finite = tl.sum(tl.sum((tl.abs(matrix) < float("inf")).to(tl.int32), axis=1), axis=0) == PADDED * PADDED
    matrix = tl.where(tl.abs(matrix) < float("inf"), matrix, 0.0)
    square = tl.sum(tl.where(same, matrix, 0.0), axis=1)
    zero = real & (square <= 0)
    zeros = tl.sum(zero.to(tl.int32), axis=0)
    length = tl.sqrt(tl.where(real & (square > 0), square, 1.0))
    cosine = tl.where(both, matrix / length[:, None] / length[None, :], 0.0) + tl.where(same, ridge, 0.0)
    shortest = tl.min(tl.where(real, length, float("inf")), axis=0)
    border = tl.where(real, shortest / length, 0.0)
    first = tl.min(tl.where(real & (length == shortest), task, PADDED), axis=0)
    inside = task == first
    point = tl.where(inside, 1.0, 0.0).to(tl.float64)
    going = tl.where(finite & (zeros == 0), LIMIT, 0)
    settled = tl.where(finite, 1, 0)
    while going > 0:
        if settled > 0:
            image = tl.sum(cosine * point[None, :], axis=1)
            excess = tl.sum(point * image, axis=0) * border - image
            excess = tl.where(real & (~inside), excess, -float("inf"))
            best = tl.max(excess, axis=0)
            going = tl.where(best > 0.25 * ridge * tl.sum(point, axis=0), going, 0)
            entering = tl.min(tl.where(excess == best, task, PADDED), axis=0)
            inside = inside | ((task == entering) & (going > 0))
        if going > 0:
            aim = tl.where(inside, _affine_minimiser(cosine, border, inside, TASKS, PADDED), 0.0)
            blocked = inside & (aim <= 0)
            settled = tl.where(tl.sum(blocked.to(tl.int32), axis=0) == 0, 1, 0)
            ratio = tl.where(blocked, point / tl.where(blocked, point - aim, 1.0), float("inf"))
            least = tl.where(settled > 0, 1.0, tl.min(ratio, axis=0))
            leaving = tl.where(settled > 0, PADDED, tl.min(tl.where(ratio == least, task, PADDED), axis=0))
            moved = point + least * (aim - point)
            inside = inside & (task != leaving)
            point = tl.where(inside, tl.where(settled > 0, aim, tl.where(moved > 0, moved, 0.0)), 0.0)
        going -= 1
    result = point * border
    result = result / tl.sum(result, axis=0)
    result = tl.where(zeros > 0, zero.to(tl.float64) / tl.where(zeros > 0, zeros, 1).to(tl.float64), result)
    result = tl.where(finite, result, float("nan"))
    tl.store(weights + task, result, mask=real)


def min_norm(gram: Tensor, warm_start: Tensor | None = None) -> Tensor:
    """Return MGDA's weights; see :func:`fastmtl.ops.min_norm`. More than 32 tasks run on torch operators.

    It starts from the shortest gradient, with or without ``warm_start``.
    """
    check_gram(gram)
    check_vector("warm_start", warm_start, gram)
    tasks = gram.shape[-1]
    if tasks > _MAX_TASKS:
        return implementation("min_norm", "reference")(gram, warm_start)
    weights = torch.empty(gram.shape[:-1], dtype=torch.float64, device=gram.device)
    min_norm_fwd_kernel[(weights.numel() // tasks,)](
        gram.double().contiguous(),
        weights,
        2.0**-42,
        LIMIT=16 * tasks + 32,
        TASKS=tasks,
        PADDED=triton.next_power_of_2(tasks),
        num_warps=1 if tasks <= 8 else 4 if tasks <= 16 else 16,
    )
    return weights
