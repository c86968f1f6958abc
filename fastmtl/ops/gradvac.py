"""Gradient Vaccine's weights: task gradients turned towards each other's usual cosine, from their Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._orders import as_orders, check_orders, check_tasks
from fastmtl.ops._registry import declare
from fastmtl.ops._square import check_gram
from fastmtl.support.dtypes import wide_dtype

__all__ = ["gradvac"]

_TARGET = 1 - 2.0**-20
_LONGEST = 2.0**100
_RESOLUTION = 2.0**-44


def _check(gram: Tensor, orders: Tensor, rho: Tensor, beta: float) -> None:
    check_gram(gram)
    check_orders(orders, gram)
    if rho.shape != gram.shape or not rho.is_floating_point():
        raise UsageError(
            f"rho must hold one float per entry of gram, which has shape {tuple(gram.shape)}, "
            f"got shape {tuple(rho.shape)} and dtype {rho.dtype}."
        )
    if rho.device != gram.device:
        raise UsageError(f"rho must be on gram's device {gram.device}, got {rho.device}.")
    if not 0 <= beta <= 1:
        raise UsageError(f"beta must be between 0 and 1, got {beta}.")


def _reference(gram: Tensor, orders: Tensor, rho: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    size = gram.shape[-1]
    grams = gram.detach().to("cpu").double().view(-1, size, size)
    averages = rho.detach().to("cpu").double().clone().view(-1, size, size)
    weights = _vaccinate(grams, as_orders(orders.cpu()), averages, beta)
    dtype = wide_dtype(gram.device)
    return weights.view(gram.shape[:-1]).to(dtype).to(gram.device), averages.view(gram.shape).to(dtype).to(gram.device)


def _vaccinate(gram: Tensor, orders: Tensor, rho: Tensor, beta: float) -> Tensor:
    """Return the (L, T) weights and update rho: all groups and tasks together, every product computed anew."""
    groups, size, _ = gram.shape
    finite = (gram.isfinite() & rho.isfinite()).all(dim=2).all(dim=1)[:, None]
    matrix = torch.where(finite[:, :, None], gram, 0)
    length = matrix.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    coefficients = torch.eye(size, dtype=gram.dtype).repeat(groups, 1, 1)
    path = length.clone()
    task = torch.arange(size)
    for others in orders.unbind(1):
        square = ((coefficients @ matrix) * coefficients).sum(dim=2)
        product = (coefficients * matrix[:, others]).sum(dim=2)
        other = length[:, others]
        average = rho[:, task, others]
        meets = (others != task) & finite
        resolved = meets & (other > 0) & (square > _RESOLUTION * path**2)
        norm = torch.where(resolved, square, 1).sqrt()
        cosine = torch.where(resolved, product / (norm * other), 0).clamp(-1, 1)
        target = average.clamp(-_TARGET, _TARGET)
        sine = (1 - target**2).sqrt()
        normal = 1 - cosine**2
        outside = torch.where(normal > _RESOLUTION, normal, 0).sqrt()
        added = norm * (target * outside - cosine * sine) / sine
        added = torch.where(resolved & (cosine < target), added.clamp(min=0).minimum(_LONGEST * length), 0)
        amount = torch.where(added > 0, added / other, 0)
        path += added
        coefficients[:, task, others] += amount
        rho[:, task, others] = torch.where(meets, (1 - beta) * average + beta * cosine, average)
    return torch.where(finite, coefficients.sum(dim=1), torch.nan)


def _fake(gram: Tensor, orders: Tensor, rho: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(gram.device)
    return gram.new_empty(gram.shape[:-1], dtype=dtype), gram.new_empty(gram.shape, dtype=dtype)


_gradvac = declare(
    "gradvac",
    "(Tensor gram, Tensor orders, Tensor rho, float beta) -> (Tensor, Tensor)",
    check=_check,
    reference=_reference,
    fake=_fake,
    check_contents=lambda gram, orders, rho, beta: check_tasks(orders),
)


def gradvac(gram: Tensor, orders: Tensor, rho: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the weights of Gradient Vaccine's update, and the averages of the cosines for the next step.

    In each group of parameters, each task i starts with p = g_i. For each j in ``orders[i]`` but i, first to last, with
    c the cosine of p and g_j and r = rho_ij,

        p      <- p + |p| (r sqrt(1 - c^2) - c sqrt(1 - r^2)) / (|g_j| sqrt(1 - r^2)) g_j    if c < r,
        rho_ij <- (1 - beta) r + beta c,

    after which the cosine of p and g_j is at least r. The update is the sum of the T vectors p. Each group has weights
    of its own, which do not depend on the scale of its G.

    For a G that is exact up to float64 rounding and targets within [-0.9, 0.9], the error of the update is at most 1e-6
    times the total length of what was added up to the vectors p, whatever the scales of the rows; unless gradients are
    opposite it is near rounding. What the formula leaves open:

    - The target r is brought into [-1 + 2^-20, 1 - 2^-20], as a cosine of 1 would need infinite weights. One step adds
      at most 2^100 |g_i|, a length that only chains of steps with such targets reach.
    - Where g_j is zero, or p is shorter than 2^-22 times the length of what was added up to it (its direction is then
      lost in float64), c = 0 and p stays. Where sqrt(1 - c^2) is below 2^-22, it counts as zero.
    - A NaN or infinity in a group's G or rho makes the group's weights NaN and leaves its averages as they are.

    Args:
        gram: (T, T) Gram matrix, or (L, T, T), one per group of parameters.
        orders: (T, K) int64 tasks that each gradient meets in all groups, K >= 0, usually a random permutation per row.
            A task's own number is skipped. Otherwise as in :func:`fastmtl.ops.pcgrad`, float keys included.
        rho: Averages of the cosines, shaped like ``gram``; zeros at first. Not written to.
        beta: Weight of the new cosine in the average, 0 to 1.

    Returns:
        (T,) or (L, T) weights, and the new averages.

    Source:
        Wang et al., "Gradient vaccine: investigating and improving multi-task optimization in massively multilingual
        models", ICLR 2021; the averages start at zero and follow the cosines before each change.

    Example:
        >>> gram, orders = torch.tensor([[1.0, -1.0], [-1.0, 4.0]]), torch.tensor([[1], [0]])
        >>> gradvac(gram, orders, torch.zeros(2, 2), beta=0.5)
        (tensor([2.0000, 1.2500], dtype=torch.float64), tensor([[ 0.0000, -0.2500],
                [-0.2500,  0.0000]], dtype=torch.float64))
    """
    return _gradvac(gram, orders, rho, beta)
