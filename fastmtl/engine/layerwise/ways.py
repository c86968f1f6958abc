"""A layer's part of the Gram matrix, from its inputs X (n, in) and the cotangents D_t (n, out) of its outputs.

The gradient of the layer's weight is ``D_t^T X``, so that its part of G is ``<D_s^T X, D_t^T X>``. Each way has a piece
for every task in the place of the gradient, with the same inner products, or adds its part of G by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastmtl.engine.layerwise.uses import Use
from fastmtl.engine.vjp import Cotangents

__all__ = ["Compressed", "Ghost", "Sketched", "Way", "gradient_of", "omega_of"]


class Way(Protocol):
    """One layer in one step."""

    def piece(self, cotangents: Cotangents) -> Tensor | None:
        """Return what stands for the gradient of the weight for a task's cotangents of the layer's outputs, by use."""

    def gram(self) -> Tensor | None:
        """Return the layer's part (T, T) of the Gram matrix that its pieces leave out, None without."""


def gradient_of(uses: Sequence[Use], cotangents: Cotangents) -> Tensor | None:
    """Return the gradient of a weight, the sum over its uses; None without any cotangent."""
    return _sum(use.gradient(cotangent) for use, cotangent in _present(uses, cotangents))


def omega_of(total: Tensor, signs: Tensor) -> Tensor:
    """Return a matrix Omega (g, k, in) with ``E[Omega^T Omega] = I``, from random signs (g, k - 1, in).

    The first row is the direction q of the inputs' mean, ``total`` (g, in), in which gradients have much of their norm
    where inputs are not negative; the others are orthogonal to it: ``(I - q q^T) s / sqrt(k - 1)`` for the signs s.
    """
    total = total.to(signs.dtype)
    norm = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    mean = (total / norm.where(norm > 0, 1.0))[:, None]
    return torch.cat([mean, (signs - (signs @ mean.mT) * mean) * signs.shape[1] ** -0.5], 1)


class Sketched:
    """Pieces ``D_t^T X Omega^T`` with a random matrix Omega (k, in), the same for all tasks.

    As ``E[Omega^T Omega] = I``, the inner products of the pieces are those of the gradients in the mean over Omega.

    Args:
        uses: The uses of the weight.
        omega: The result of :func:`omega_of`.
    """

    def __init__(self, uses: Sequence[Use], omega: Tensor) -> None:
        self.uses = uses
        self.projected = [use.project(omega) for use in uses]

    def piece(self, cotangents: Cotangents) -> Tensor | None:
        """Return (g, out, k)."""
        sketches = (
            use.sketch(cotangent, projected)
            for use, cotangent, projected in zip(self.uses, cotangents, self.projected, strict=True)
            if cotangent is not None
        )
        return _sum(sketches)

    def gram(self) -> Tensor | None:
        """Return None."""
        return None


class Compressed:
    """Pieces ``L^T D_t`` with a triangular L (n, n) for which ``L L^T = X X^T``: fewer numbers where n < in."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self.uses = uses
        # (g, n, n), lower triangular.
        self.factor = _factor(uses)

    def piece(self, cotangents: Cotangents) -> Tensor | None:
        """Return the numbers of ``L^T D_t``, (g, n, out)."""
        columns = _columns(self.uses, cotangents)
        if columns is None:
            return None
        factor = self.factor.to(columns.dtype)
        # Upper and lower half, without the zeros of the factor's corner.
        half = factor.shape[1] // 2
        piece = columns.new_empty(columns.shape)
        # Group by group: a product of a batch of one is slower.
        for lower, column, out in zip(factor, columns, piece, strict=True):
            torch.mm(lower[:, :half].mT, column, out=out[:half])
            torch.mm(lower[half:, half:].mT, column[half:], out=out[half:])
        return piece

    def gram(self) -> Tensor | None:
        """Return None."""
        return None


class Ghost:
    """No pieces, but the inner products of ``X X^T`` with ``D_s D_t^T``, in float64."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self.uses = uses
        self.products = _products(uses)
        self.columns: list[Tensor | None] = []

    def piece(self, cotangents: Cotangents) -> Tensor | None:
        """Keep the cotangents; return None."""
        columns = _columns(self.uses, cotangents)
        self.columns.append(None if columns is None else columns.double())
        return None

    def gram(self) -> Tensor | None:
        """Return (T, T)."""
        like = next((columns for columns in self.columns if columns is not None), None)
        if like is None:
            return None
        stacked = torch.stack([torch.zeros_like(like) if one is None else one for one in self.columns])
        gram = (self.products @ stacked).flatten(1) @ stacked.flatten(1).mT
        return (gram + gram.mT) / 2


def _present(uses: Sequence[Use], cotangents: Cotangents) -> list[tuple[Use, Tensor]]:
    return [(use, one) for use, one in zip(uses, cotangents, strict=True) if one is not None]


def _sum(tensors: Iterable[Tensor]) -> Tensor | None:
    total = None
    for tensor in tensors:
        total = tensor if total is None else total + tensor
    return total


def _columns(uses: Sequence[Use], cotangents: Cotangents) -> Tensor | None:
    """Return the cotangents of all uses, one below the other (g, n, out); None if there is none."""
    present = [one for one in cotangents if one is not None]
    if not present:
        return None
    parts = [
        use.columns(one) if one is not None else present[0].new_zeros(use.groups, use.samples, use.fan_out)
        for use, one in zip(uses, cotangents, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _products(uses: Sequence[Use]) -> Tensor:
    """Return ``X X^T`` of the inputs of all uses, (g, n, n) float64."""
    matrices = [use.matrix().double() for use in uses]
    matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)
    return matrix @ matrix.mT


def _factor(uses: Sequence[Use]) -> Tensor:
    """Return a square L with ``L L^T = X X^T``.

    With linearly dependent rows rounding could make the factorisation fail; the term added to the diagonal is far below
    the precision of float32. A factorisation that fails nevertheless is NaN, not something else.
    """
    products = _products(uses)
    diagonal = products.diagonal(dim1=1, dim2=2)
    rounding = max(1e-13, 1e-15 * products.shape[-1])
    # Inputs may be zero, all of them.
    diagonal.add_(rounding * diagonal.sum(-1, keepdim=True) + torch.finfo(torch.float64).tiny)
    factor, info = torch.linalg.cholesky_ex(products)
    return factor.where((info == 0)[:, None, None], torch.nan)
