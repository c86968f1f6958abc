"""UPGrad's weights: the mean of the task gradients' projections onto their dual cone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._registry import implementation
from fastmtl.ops._square import check_gram, declare_solver

__all__ = ["upgrad"]


def _check_upgrad(gram: Tensor, norm_eps: float, reg_eps: float) -> None:
    check_gram(gram)
    for name, value in (("norm_eps", norm_eps), ("reg_eps", reg_eps)):
        if not value >= 0:
            raise UsageError(f"{name} must be at least 0, got {value}.")


def _upgrad_weights(gram: Tensor, norm_eps: float, reg_eps: float) -> Tensor:
    trace = gram.diagonal().sum()
    identity = torch.eye(len(gram), dtype=gram.dtype)
    scaled = gram * 0 if trace < norm_eps or trace == 0 else gram / trace
    projected: Tensor = implementation("dual_cone", "reference")(scaled + reg_eps * identity, identity / len(gram))
    return projected.sum(0)


_upgrad = declare_solver(
    "upgrad", "(Tensor gram, float norm_eps, float reg_eps) -> Tensor", check=_check_upgrad, solve=_upgrad_weights
)


def upgrad(gram: Tensor, norm_eps: float = 1e-4, reg_eps: float = 1e-4) -> Tensor:
    """Return the weights w of T gradients for which sum_t w_t g_t is UPGrad's update.

    Each g_t is projected onto the cone of directions that have no negative product with any gradient, and the update is
    the mean of the projections, so that weights are at least 1 / T. They are taken for G / tr(G) + reg_eps I, so that a
    gradient meets a direction with a product of at least -reg_eps tr(G) w_t; with reg_eps = 0 they are those of
    :func:`dual_cone`, up to the bounds given there.

    Args:
        gram: (T, T) Gram matrix, or (L, T, T) those of L groups of parameters, for (L, T).
        norm_eps: Where tr(G) is below it, G counts as zero and all weights are 1 / T.
        reg_eps: Regularisation of the normalised matrix, at least 0 as ``norm_eps`` is.

    Source:
        Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024.

    Example:
        >>> upgrad(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]), reg_eps=0.0)
        tensor([1.0000, 0.6250], dtype=torch.float64)
    """
    return _upgrad(gram, norm_eps, reg_eps)
