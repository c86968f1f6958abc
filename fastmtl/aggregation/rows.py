"""Jacobians as lists of (T, ...) tensors: their Gram matrix, and weighted sums of their rows into ``.grad``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.engine.comm import combined
from fastmtl.engine.gradients import Grads, add_grads
from fastmtl.ops._rows import is_dense
from fastmtl.support.dtypes import wide_dtype

__all__ = ["add_combined", "add_combined_rows", "as_matrix", "gram_of"]


def _as_rows(jacobians: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return the T rows, each a view into every dense Jacobian, and parts of the sparse ones."""
    columns = [_sparse_rows(each) if each.is_sparse else each.unbind(0) for each in jacobians]
    return list(zip(*columns, strict=True))


def _sparse_rows(jacobian: Tensor) -> list[Tensor]:
    """Return the T rows of a sparse Jacobian (T, ...)."""
    jacobian = jacobian.coalesce()
    indices, values = jacobian.indices(), jacobian.values()
    ends = torch.searchsorted(indices[0].contiguous(), torch.arange(len(jacobian) + 1, device=values.device)).tolist()
    return [
        torch.sparse_coo_tensor(
            indices[1:, begin:end],
            values[begin:end],
            jacobian.shape[1:],
            is_coalesced=True,
            check_invariants=False,
        )
        for begin, end in itertools.pairwise(ends)
    ]


def as_matrix(jacobian: Tensor) -> Tensor:
    """Return a (T, ...) Jacobian as (T, P), dense."""
    if jacobian.is_sparse:
        jacobian = jacobian.to_dense()
    return jacobian.reshape(len(jacobian), math.prod(jacobian.shape[1:]))


@torch.no_grad()
def gram_of(jacobians: Sequence[Tensor]) -> Tensor:
    """Return the (T, T) float64 Gram matrix of the rows of all Jacobians together."""
    if not len(jacobians[0]):
        return jacobians[0].new_empty(0, 0, dtype=wide_dtype(jacobians[0].device))
    return ops.gram(_as_rows(jacobians))


def add_combined(tensors: Sequence[Tensor], jacobians: Sequence[Tensor], weights: Tensor) -> None:
    """Add the weighted sum of the rows of all Jacobians to ``.grad`` of each tensor."""
    if not len(weights) or weights.device != jacobians[0].device:
        jacobians = [each.to_dense() if each.is_sparse else each for each in jacobians]
        sums = [torch.tensordot(weights.to(jacobian), jacobian, dims=1) for jacobian in jacobians]
        add_grads(tensors, [total.to(tensor.dtype) for total, tensor in zip(sums, tensors, strict=True)])
    else:
        add_combined_rows(tensors, _as_rows(jacobians), weights, None)


@torch.no_grad()
def add_combined_rows(
    tensors: Sequence[Tensor], rows: Sequence[Grads], weights: Tensor, groups: Sequence[int] | None
) -> None:
    """Add ``sum_t w_t row_t`` to ``.grad`` of each tensor, in one pass over its rows; sparse where all rows are.

    With the group of each tensor the weights are (L, T).
    """
    sparse = [k for k, column in enumerate(zip(*rows, strict=True)) if _is_sparse(column)]
    if sparse:
        sums = combined(sparse, [list(row) for row in rows], weights, groups)
        add_grads([tensors[k] for k in sparse], sums)
        dense = [k for k in range(len(tensors)) if k not in sparse]
        tensors, rows = [tensors[k] for k in dense], [[row[k] for k in dense] for row in rows]
        groups = None if groups is None else [groups[k] for k in dense]
    # Those with a gradient come first, as the others will have one too.
    for fresh in (False, True):
        some = [k for k, tensor in enumerate(tensors) if (tensor.grad is None) == fresh]
        if not some:
            continue
        out = [torch.empty_like(tensors[k]) if fresh else _dense_grad(tensors[k]) for k in some]
        of_some = None if groups is None else [groups[k] for k in some]
        used = weights if of_some is None else weights[: max(of_some) + 1]
        ops.combine_(out, [[row[k] for k in some] for row in rows], used, of_some, accumulate=not fresh)
        for k, grad in zip(some, out, strict=True):
            tensors[k].grad = grad


def _is_sparse(column: Grads) -> bool:
    known = [grad for grad in column if grad is not None]
    return bool(known) and all(grad.is_sparse for grad in known)


def _dense_grad(tensor: Tensor) -> Tensor:
    """Return the gradient in dense memory, which can be added to."""
    grad = tensor.grad
    assert grad is not None
    if grad.is_sparse:
        return grad.to_dense()
    return grad if is_dense(grad) else grad.clone(memory_format=torch.contiguous_format)
