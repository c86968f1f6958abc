"""State of the rows' size that ops update in place: a tensor for each of the T x K gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._rows import Flat, Rows, check_float, check_rows, device_of, flatten, shared_strides

__all__ = ["check_state", "pairs", "updated"]

R = TypeVar("R")


def check_state(name: str, state: Sequence[Tensor], rows: Flat, num_rows: int) -> None:
    """Refuse rows that no backend takes, and state that does not fit them.

    Raises:
        UsageError: Wrong number, shape, dtype, device or layout of a tensor.
    """
    check_rows(rows, num_rows)
    if len(state) != len(rows):
        raise UsageError(f"{name} must hold one tensor for each of the {len(rows)} tensors of rows, got {len(state)}.")
    device = device_of(state)
    width = len(rows) // num_rows
    for index, (own, row) in enumerate(zip(state, rows, strict=True)):
        place = f"{name}[{index // width}][{index % width}]"
        check_float(place, own, device)
        if row is not None and (row.shape != own.shape or row.device != device):
            raise UsageError(
                f"{place} must have the shape {tuple(row.shape)} of its gradient on {row.device}, "
                f"got {tuple(own.shape)} on {own.device}."
            )
        first = state[index % width]
        if own.shape != first.shape:
            raise UsageError(f"{place} must have the shape {tuple(first.shape)} as in row 0, got {tuple(own.shape)}.")
    for k in range(width):
        column = state[k::width]
        strides = shared_strides(column)
        if any(s != t for own in column for n, s, t in zip(own.shape, own.stride(), strides, strict=True) if n > 1):
            raise UsageError(f"{name} must hold tensor {k} of all rows in one dense memory layout.")


def pairs(state: Sequence[Tensor], rows: Flat, num_rows: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield row number, state and gradient of each tensor."""
    width = len(rows) // num_rows
    for index, (own, row) in enumerate(zip(state, rows, strict=True)):
        yield index // width, own, row


def updated(op: Callable[..., R], state: Rows, rows: Rows, *args: object) -> R:
    """Return the result of an op that updates the state in place, of which autograd is told."""
    flat, num_rows = flatten(rows)
    own = cast(list[Tensor], flatten(state)[0])
    result = op(own, flat, num_rows, *args)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(own)
    return result
