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

__all__ = ["Column", "addresses", "as_pointers", "dense_columns", "in_layout", "upcast"]


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
    """Return the addresses of tensors; 0 for None."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


@triton.jit
def as_pointers(places: tl.tensor, SIZE: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """Return SIZE addresses as a vector of PADDED elements, filled up with zeros."""
    index = tl.arange(0, PADDED)
    pointers = tl.zeros((PADDED,), tl.int64)
    for t in tl.static_range(SIZE):
        pointers = tl.where(index == t, places[t], pointers)
    return pointers


@triton.jit
def upcast(value: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Return a loaded value in a wider type; bfloat16 is converted to float32 first, as the interpreter needs it."""
    if value.dtype.primitive_bitwidth < 32:
        return value.to(tl.float32).to(KIND)
    return value.to(KIND)
