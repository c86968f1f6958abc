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

from fastmtl.ops._rows import shared_strides

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
    alike = all(s == t for n, s, t in zip(tensor.shape, tensor.stride(), strides, strict=True) if n != 1)
    if alike and tensor.dtype == dtype:
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
    """Return where tensors lie; 0 for None."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


@triton.jit
def as_pointers(places: tl.tensor, SIZE: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """Return SIZE addresses as a vector of PADDED, 0 behind them."""
    index = tl.arange(0, PADDED)
    found = tl.zeros((PADDED,), tl.int64)
    for t in tl.static_range(SIZE):
        found = tl.where(index == t, places[t], found)
    return found


@triton.jit
def upcast(value: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Return what was loaded in a wider type; bfloat16 goes by float32, which the interpreter asks for."""
    if value.dtype.primitive_bitwidth < 32:
        return value.to(tl.float32).to(KIND)
    return value.to(KIND)
