"""Rows: T lists of K gradients, as every op over a Jacobian takes them, and state that ops update beside them.

A row is the gradient of one task, kept as the list of tensors autograd returned. Ops see all rows as one flat
task-major list (row t, tensor k at ``t * K + k``); None stands for a zero gradient. What does not fit is refused with
a :class:`fastmtl.errors.UsageError`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.support.dtypes import wide_dtype

__all__ = [
    "MAX_ROWS",
    "Flat",
    "Groups",
    "Rows",
    "check_float",
    "check_groups",
    "check_per_row",
    "check_rows",
    "check_state",
    "columns",
    "device_of",
    "empty_sum",
    "empty_wide",
    "flatten",
    "has_strides",
    "is_dense",
    "pairs",
    "present",
    "shared_strides",
    "sum_dtype",
    "updated",
]

Rows = Tensor | Sequence[Sequence[Tensor | None]]
Flat = Sequence[Tensor | None]
Groups = Sequence[int] | None
R = TypeVar("R")

# What a kernel takes; more are taken in blocks.
MAX_ROWS = 128
FLOAT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def flatten(rows: Rows) -> tuple[list[Tensor | None], int]:
    """Return the rows as one flat task-major list, and their number T; all must have one length, and T >= 1."""
    if isinstance(rows, Tensor):
        if rows.dim() != 2:
            raise UsageError(f"rows as one tensor must have the shape (T, P), got {tuple(rows.shape)}.")
        rows = [[row] for row in rows.unbind(0)]
    if not len(rows):
        raise UsageError("rows must hold at least 1 row, got 0.")
    width = len(rows[0])
    flat: list[Tensor | None] = []
    for number, row in enumerate(rows):
        if len(row) != width:
            raise UsageError(
                f"rows must have the same number of tensors, got {width} in row 0 and {len(row)} in row {number}."
            )
        flat.extend(row)
    return flat, len(rows)


def columns(flat: Flat, num_rows: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield, for each of the K parameters, the rows that have a gradient of it, as (t, tensor)."""
    width = len(flat) // num_rows
    for k in range(width):
        yield [(t, row) for t in range(num_rows) if (row := flat[t * width + k]) is not None]


def present(flat: Flat, num_rows: int) -> list[bool]:
    """Return for each of the K parameters whether a row has a gradient of it."""
    width = len(flat) // num_rows
    return [flat[k] is not None or any(row is not None for row in flat[k::width]) for k in range(width)]


def device_of(flat: Flat) -> torch.device:
    """Return the device of the first tensor, the CPU if there is none."""
    return next((row.device for row in flat if row is not None), torch.device("cpu"))


def check_rows(flat: Flat, num_rows: int) -> None:
    """Refuse rows of a number, shape, dtype, layout or device that no backend takes."""
    if num_rows < 1 or len(flat) % num_rows:
        raise UsageError(
            f"rows must hold the same number of tensors in each of {num_rows} rows, got {len(flat)} in all."
        )
    device = device_of(flat)
    for k, column in enumerate(columns(flat, num_rows)):
        for t, row in column:
            name = f"rows[{t}][{k}]"
            first_row, first = column[0]
            if row.layout != torch.strided:
                raise UsageError(f"{name} must be a dense tensor, got layout {row.layout}.")
            if row.dtype not in FLOAT_TYPES:
                raise UsageError(f"{name} must be float32, float64, bfloat16 or float16, got {row.dtype}.")
            if row.device != device:
                raise UsageError(f"{name} must be on {device} as the other rows, got {row.device}.")
            if row.shape != first.shape:
                raise UsageError(
                    f"{name} must have shape {tuple(first.shape)} as rows[{first_row}][{k}], got {tuple(row.shape)}."
                )


def check_float(place: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse what is not a dense tensor of one of the four float types on this device."""
    if tensor.layout != torch.strided or tensor.dtype not in FLOAT_TYPES or tensor.device != device:
        raise UsageError(
            f"{place} must be a dense float32, float64, bfloat16 or float16 tensor on {device}, "
            f"got {tensor.dtype}, {tensor.layout} on {tensor.device}."
        )


def check_per_row(name: str, vector: Tensor, num_rows: int, device: torch.device) -> None:
    """Refuse what does not hold one number per row on this device."""
    if vector.shape != (num_rows,) or not vector.is_floating_point() or vector.device != device:
        raise UsageError(
            f"{name} must hold {num_rows} floats on {device}, one per row, "
            f"got shape {tuple(vector.shape)}, {vector.dtype} on {vector.device}."
        )


def check_groups(groups: Groups, width: int) -> int:
    """Return the number of groups L, 1 for None; each of the ``width`` parameters must have one of at least 0."""
    if groups is None:
        return 1
    if len(groups) != width:
        raise UsageError(f"groups must name one group for each of the {width} tensors of a row, got {len(groups)}.")
    if any(group < 0 for group in groups):
        raise UsageError(f"groups must be at least 0, got {min(groups)}.")
    return max(groups, default=-1) + 1


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def has_strides(column: Iterable[Tensor], strides: Sequence[int]) -> bool:
    """Whether all tensors have these strides, as far as a dimension has more than one element."""
    return all(
        stride == expected or size <= 1
        for tensor in column
        for size, stride, expected in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def empty_wide(rows: Flat, *shape: int) -> Tensor:
    """Return an empty tensor for sums over all entries, in float64, or float32 on MPS."""
    device = device_of(rows)
    return torch.empty(shape, dtype=wide_dtype(device), device=device)


def empty_sum(column: Sequence[Tensor]) -> Tensor:
    """Return an empty tensor for a sum of tensors of one shape: in their promoted dtype and :func:`shared_strides`."""
    dtype = functools.reduce(torch.promote_types, (row.dtype for row in column))
    return torch.empty_strided(column[0].shape, shared_strides(column), dtype=dtype, device=column[0].device)


def sum_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are taken in: float64 if a summand is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def shared_strides(column: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the strides of the dense layout all tensors of one shape share, or of the contiguous one."""
    first = column[0]
    if first.numel() and is_dense(first) and has_strides(column[1:], first.stride()):
        return first.stride()
    return torch.empty(first.shape, device="meta").stride()


def check_state(name: str, state: Sequence[Tensor], rows: Flat, num_rows: int) -> None:
    """Refuse rows that no backend takes, and state that does not fit them."""
    check_rows(rows, num_rows)
    if len(state) != len(rows):
        raise UsageError(f"{name} must hold one tensor for each of the {len(rows)} tensors of rows, got {len(state)}.")
    device = device_of(state)
    width = len(rows) // num_rows
    for index, (tensor, row) in enumerate(zip(state, rows, strict=True)):
        place = f"{name}[{index // width}][{index % width}]"
        check_float(place, tensor, device)
        if row is not None and (row.shape != tensor.shape or row.device != device):
            raise UsageError(
                f"{place} must have the shape {tuple(row.shape)} of its gradient on {row.device}, "
                f"got {tuple(tensor.shape)} on {tensor.device}."
            )
        shape = state[index % width].shape
        if tensor.shape != shape:
            raise UsageError(f"{place} must have the shape {tuple(shape)} as in row 0, got {tuple(tensor.shape)}.")
    for k in range(width):
        column = state[k::width]
        if not has_strides(column, shared_strides(column)):
            raise UsageError(f"{name} must hold tensor {k} of all rows in one dense memory layout.")


def pairs(state: Sequence[Tensor], rows: Flat, num_rows: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield row number, state and gradient of each tensor."""
    width = len(rows) // num_rows
    for index, (tensor, row) in enumerate(zip(state, rows, strict=True)):
        yield index // width, tensor, row


def updated(op: Callable[..., R], state: Rows, rows: Rows, *args: object) -> R:
    """Run an op that updates the state in place, tell autograd of the change, and return the op's result."""
    flat, num_rows = flatten(rows)
    tensors = cast(list[Tensor], flatten(state)[0])
    result = op(tensors, flat, num_rows, *args)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)
    return result
