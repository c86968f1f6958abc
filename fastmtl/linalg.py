"""Linear algebra by TorchJD's names: types of matrices, projections onto the dual cone of the task gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.settings import Declared, setting

__all__ = ["DualConeProjector", "Matrix", "PSDMatrix", "QuadprogProjector", "normalized"]


class Matrix(Tensor):
    """A tensor of two dimensions, for annotations."""


class PSDMatrix(Matrix):
    """A symmetric positive semidefinite matrix, such as a Gram matrix, for annotations."""


def normalized(gram: Tensor, norm_eps: float) -> Tensor:
    """Return G, or each of (L, T, T), divided by its trace, zero where that is below ``norm_eps``."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return torch.where(trace < norm_eps, 0.0, gram / torch.where(trace > 0, trace, 1.0))


class DualConeProjector(ABC):
    """Projects combinations of gradients onto the cone of the directions that conflict with none of them."""

    @abstractmethod
    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        """Return the (..., T) weights v >= u that minimise v^T G v with the (T, T) Gram matrix, for each u in ``U``.

        With those of L groups of parameters, (L, T, T), each has its own u: they are (L, ..., T).
        """


class QuadprogProjector(Declared, DualConeProjector):
    """The projection by :func:`fastmtl.ops.dual_cone`; the name is that of the solver TorchJD calls.

    G is divided by its trace, or dropped where that is below ``norm_eps``, and ``reg_eps`` is added to its diagonal.

    Raises:
        UsageError: One of them is negative.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, Proposition 1.
    """

    norm_eps: float = setting(default=0.0001, least=0)
    reg_eps: float = setting(default=0.0001, least=0)

    @torch.no_grad()
    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        """Return the weights, in the dtype of ``G``."""
        wide = G.to(wide_dtype(G.device))
        identity = torch.eye(G.shape[-1], dtype=wide.dtype, device=G.device)
        matrix = normalized(wide, self.norm_eps) + self.reg_eps * identity
        projected = ops.dual_cone(matrix, U.to(wide).reshape(*G.shape[:-2], -1, G.shape[-1]))
        return projected.reshape(U.shape).to(G.dtype)
