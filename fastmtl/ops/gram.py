"""The Gram matrix of the task gradients, G = J J^T, without ever building J."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._blocks import gram_of_blocks
from fastmtl.ops._registry import declare
from fastmtl.ops._rows import MAX_ROWS, Flat, Groups, Rows, check_groups, check_rows, columns, empty_wide, flatten
from fastmtl.ops._touched import are_sparse, compacted

__all__ = ["gram", "gram_of_flat", "gram_reference"]


def _check(rows: Flat, num_rows: int, groups: Groups = None) -> None:
    check_rows(rows, num_rows)
    check_groups(groups, len(rows) // num_rows)


def gram_reference(rows: Flat, num_rows: int, groups: Groups = None) -> Tensor:
    """Return the result of :func:`gram` for a flat task-major list, by plain torch operators."""
    num_groups = check_groups(groups, len(rows) // num_rows)
    result = empty_wide(rows, num_groups, num_rows, num_rows).zero_()
    for k, column in enumerate(columns(rows, num_rows)):
        if column:
            present = torch.tensor([t for t, _ in column], device=result.device)
            jacobian = torch.stack([row.reshape(-1).to(result.dtype) for _, row in column])
            result[groups[k] if groups else 0, present[:, None], present] += jacobian @ jacobian.T
    # A matrix product is not symmetric to the last bit, a Gram matrix is.
    result = result.triu() + result.triu(1).mT
    return result[0] if groups is None else result


def _fake(rows: Flat, num_rows: int, groups: Groups = None) -> Tensor:
    num_groups = check_groups(groups, len(rows) // num_rows)
    return empty_wide(rows, *(() if groups is None else (num_groups,)), num_rows, num_rows)


_gram = declare(
    "gram",
    "(Tensor?[] rows, int num_rows, int[]? groups=None) -> Tensor",
    check=_check,
    reference=gram_reference,
    fake=_fake,
)


def gram_of_flat(flat: Flat, num_rows: int, groups: Groups = None) -> Tensor:
    """Return the result of :func:`gram` for a flat task-major list."""
    if are_sparse(flat):
        flat, _ = compacted(flat, num_rows)
    if num_rows <= MAX_ROWS:
        return _gram(flat, num_rows, groups)
    num_groups = check_groups(groups, len(flat) // num_rows)
    try:
        return gram_of_blocks(_gram, flat, num_rows, groups, num_groups)
    except UsageError:
        # It counts the rows of a block.
        _check(flat, num_rows, groups)
        raise


def gram(rows: Rows, groups: Groups = None) -> Tensor:
    """Return the Gram matrix G_ij = <row_i, row_j> of T gradients.

    The rows are read once, where they lie. Products are summed in float32 within short chunks and in float64 across
    them (float64 throughout for float64 rows); where float32's range is too small for the squares of a chunk, in
    float64 too. A NaN or infinity in row i shows in row and column i.

    Args:
        rows: T lists of the K gradients of one task each, as :func:`torch.autograd.grad` returns them, or a
            (T, P) tensor. Tensor k has the same shape in all rows; dtype (float32, float64, bfloat16, float16) and
            strides may differ. None is a zero gradient. Sparse gradients in COO layout, coalesced or not, cost what
            their values cost.
        groups: For each of the K tensors the group it belongs to, 0 .. L-1; each group gets a matrix of its own.

    Returns:
        (T, T) or, with groups, (L, T, T) float64 on the rows' device.

    Example:
        >>> rows = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]]
        >>> gram(rows)
        tensor([[ 5.,  1.],
                [ 1., 10.]], dtype=torch.float64)
    """
    flat, num_rows = flatten(rows)
    return gram_of_flat(flat, num_rows, groups)
