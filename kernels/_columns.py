"""Rows as the Triton kernels take them: the addresses of one parameter's gradients, as plain arguments of a launch.

Addresses that are arguments need no table in device memory: nothing is copied to the device, no launch waits, and a
CUDA graph captures them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl.ops._rows import has_strides, shared_strides

__all__ = [
    "NOWHERE",
    "Column",
    "addresses",
    "aligned",
    "as_pointers",
    "as_vector",
    "dense_columns",
    "in_layout",
    "is_there",
    "upcast",
]

# The address of a row that is not there: of the type that addresses have, so that one compiled kernel takes both.
NOWHERE: tl.constexpr = tl.constexpr(1 << 62)


class Column(NamedTuple):
    """The gradients of one parameter in one dtype and one dense layout.

    Attributes:
        number: Which parameter.
        rows: T tensors, None for zero.
        first: The first of them that is there.
    """

    number: int
    rows: list[Tensor | None]
    first: Tensor


def in_layout(tensor: Tensor, strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the tensor, or a copy where its dtype or its layout differs."""
    if tensor.dtype == dtype and has_strides([tensor], strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=dtype, device=tensor.device).copy_(tensor)


def dense_columns(flat: Sequence[Tensor | None], num_rows: int) -> Iterator[Column]:
    """Yield every parameter that has a gradient."""
    width = len(flat) // num_rows
    for k in range(width):
        present = [row for row in flat[k::width] if row is not None]
        if not present:
            continue
        dtype = present[0].dtype
        for row in present:
            dtype = torch.promote_types(dtype, row.dtype)
        strides = shared_strides(present)
        rows = [None if row is None else in_layout(row, strides, dtype) for row in flat[k::width]]
        yield Column(k, rows, next(row for row in rows if row is not None))


def addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return the addresses of tensors; NOWHERE for None, and for an empty tensor that has no memory."""
    return tuple((tensor is not None and tensor.data_ptr()) or NOWHERE.value for tensor in tensors)


def aligned(*addresses: int) -> bool:
    """Return whether vectors of 16 bytes can be loaded from all addresses."""
    return all(address % 16 == 0 for address in addresses)


@triton.jit
def as_vector(values: tl.tensor, FILL: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """Return SIZE integers as a vector of PADDED elements, filled up with FILL."""
    index = tl.arange(0, PADDED)
    vector = tl.full((PADDED,), FILL, tl.int64)
    for t in tl.static_range(SIZE):
        vector = tl.where(index == t, values[t], vector)
    return vector


@triton.jit
def as_pointers(
    places: tl.tensor, like: tl.tensor, ALIGNED: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr
) -> tl.tensor:
    """Return SIZE addresses as a column of PADDED pointers of the type of ``like``, filled up with NOWHERE.

    The compiler forgets of integers that become pointers that they are multiples of 16, and loads element by element.
    """
    pointers = as_vector(places, NOWHERE, SIZE, PADDED).to(like.dtype)
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return pointers[:, None]


@triton.jit
def is_there(places: tl.tensor, SIZE: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """Return which of SIZE addresses are those of a row, as a column of PADDED elements."""
    return (as_vector(places, NOWHERE, SIZE, PADDED) != NOWHERE)[:, None]


@triton.jit
def upcast(value: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Return a loaded value in a wider type; bfloat16 is converted to float32 first, as the interpreter needs it."""
    if value.dtype.primitive_bitwidth < 32:
        return value.to(tl.float32).to(KIND)
    return value.to(KIND)
