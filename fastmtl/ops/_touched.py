"""Sparse gradients among the rows of an op, as dense tensors of those rows of a table that some gradient touches.

Autograd gives a table of embeddings with ``sparse=True`` a gradient in COO layout: indices, which may repeat, and a
value for each. All ops on rows are sums over entries, or treat each entry by itself, so that entries in which all
gradients are zero may be left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._rows import Flat
from fastmtl.ops.tables import group_rows, sum_rows

__all__ = ["Touched", "aligned_rows", "are_sparse", "compacted", "dense_sum", "sparse_rows"]


@dataclass(frozen=True, slots=True)
class Touched:
    """Places of a tensor, of which gradients have values.

    Attributes:
        indices: (s, U) int64, in ascending order and each once.
        shape: The shape of the tensor, of which the first s dimensions are indexed.
    """

    indices: Tensor
    shape: torch.Size

    def sparse(self, values: Tensor) -> Tensor:
        """Return the coalesced sparse tensor with these values (U, ...)."""
        return torch.sparse_coo_tensor(
            self.indices, values, self.shape, is_coalesced=True, check_invariants=False, requires_grad=False
        )


def are_sparse(flat: Flat) -> bool:
    """Return whether some gradient is sparse, in COO layout."""
    return any(row is not None and row.is_sparse for row in flat)


def compacted(flat: Flat, num_rows: int) -> tuple[list[Tensor | None], list[Touched | None]]:
    """Return all gradients as dense ones, and for each of the K parameters the places they are of; None for all.

    A parameter of which only some gradients are sparse has dense ones.
    """
    width = len(flat) // num_rows
    dense: list[Tensor | None] = list(flat)
    touched: list[Touched | None] = [None] * width
    for k in range(width):
        places = [t * width + k for t in range(num_rows) if flat[t * width + k] is not None]
        column = [row for place in places if (row := flat[place]) is not None]
        if not any(row.is_sparse for row in column):
            continue
        _check_column(column, k)
        if all(row.is_sparse and row.sparse_dim() == column[0].sparse_dim() for row in column):
            touched[k], values = _compact(column)
        else:
            values = [row.to_dense() if row.is_sparse else row for row in column]
        for place, value in zip(places, values, strict=True):
            dense[place] = value
    return dense, touched


def aligned_rows(flat: Flat, num_rows: int) -> list[Tensor | None]:
    """Return the gradients with sparse ones coalesced, and at the same indices in all rows."""
    if _are_aligned(flat, num_rows):
        return list(flat)
    dense, touched = compacted(flat, num_rows)
    return [
        value if value is None or (places := touched[index % len(touched)]) is None else places.sparse(value)
        for index, value in enumerate(dense)
    ]


def _are_aligned(flat: Flat, num_rows: int) -> bool:
    """Return whether the sparse gradients of each parameter have the same indices already, each once."""
    width = len(flat) // num_rows
    for k in range(width):
        column = [row for row in flat[k::width] if row is not None and row.is_sparse]
        if column and not (
            len(column) == sum(row is not None for row in flat[k::width])
            and all(row.is_coalesced() and _is_same(row._indices(), column[0]._indices()) for row in column)
        ):
            return False
    return True


def sparse_rows(values: Sequence[Tensor], touched: Sequence[Touched | None]) -> list[Tensor]:
    """Return sums over compacted gradients, one for each parameter that has one, as sparse where those were."""
    return [value if places is None else places.sparse(value) for value, places in zip(values, touched, strict=True)]


def dense_sum(target: Tensor, values: Tensor, touched: Touched, accumulate: bool) -> None:
    """Write compact values (U, ...) to their places in a dense tensor, zero elsewhere, or add them."""
    values = values.to(target.dtype)
    if not accumulate:
        target.zero_()
    if len(touched.indices) == 1:
        (target.index_add_ if accumulate else target.index_copy_)(0, touched.indices[0], values)
    else:
        target.index_put_(tuple(touched.indices), values, accumulate=accumulate)


def _check_column(column: Sequence[Tensor], k: int) -> None:
    first = column[0]
    for row in column:
        if row.shape != first.shape or row.device != first.device or (row.is_sparse and row.dtype != first.dtype):
            raise UsageError(
                f"Sparse gradients of tensor {k} must have one shape, dtype and device, got {tuple(first.shape)} "
                f"{first.dtype} on {first.device} and {tuple(row.shape)} {row.dtype} on {row.device}."
            )


def _compact(column: Sequence[Tensor]) -> tuple[Touched, list[Tensor]]:
    """Return the places that sparse gradients touch, and the values (U, ...) of each there."""
    first = column[0]
    indices = [row._indices() for row in column]
    values = [row._values() for row in column]
    if all(_is_same(index, indices[0]) for index in indices):
        if all(row.is_coalesced() for row in column):
            return Touched(indices[0], first.shape), values
        return _coalesce(indices[0], values, first)
    parts = [
        (Touched(row._indices(), first.shape), row._values())
        if row.is_coalesced()
        else _first(_coalesce(row._indices(), [row._values()], first))
        for row in column
    ]
    sizes = first.shape[: first.sparse_dim()]
    keys = [_keys(places.indices, sizes) for places, _ in parts]
    every = torch.cat(keys).unique()
    spread = [
        value.new_zeros(len(every), *value.shape[1:]).index_copy_(0, torch.searchsorted(every, key), value)
        for key, (_, value) in zip(keys, parts, strict=True)
    ]
    return Touched(_indices(every, sizes), first.shape), spread


def _first(part: tuple[Touched, list[Tensor]]) -> tuple[Touched, Tensor]:
    return part[0], part[1][0]


def _coalesce(indices: Tensor, values: Sequence[Tensor], like: Tensor) -> tuple[Touched, list[Tensor]]:
    sizes = like.shape[: like.sparse_dim()]
    rows, order, starts = group_rows(_keys(indices, sizes))
    flat = [value.reshape(len(value), math.prod(value.shape[1:])) for value in values]
    sums = sum_rows(flat, order, starts)
    shaped = [total.view(len(rows), *value.shape[1:]) for total, value in zip(sums, values, strict=True)]
    return Touched(_indices(rows, sizes), like.shape), shaped


def _keys(indices: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return one number for each column of indices (s, n), in the order of the indices."""
    keys = indices[0]
    for index, size in zip(indices[1:], sizes[1:], strict=True):
        keys = keys * size + index
    return keys


def _indices(keys: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the indices (s, n) of which these are the keys."""
    if len(sizes) == 1:
        return keys[None]
    return torch.stack(torch.unravel_index(keys, tuple(sizes)))


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two index tensors are the same memory; equal numbers elsewhere are not looked at."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
