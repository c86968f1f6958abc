"""gram on Triton: products in float64, first stage per program, second stage a sum in fixed order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastmtl.kernels._columns import Column, addresses, aligned, as_pointers, dense_columns, is_there, upcast
from fastmtl.kernels._launch import GRAM, pick
from torch import Tensor

from fastmtl.ops._rows import check_groups, check_rows, device_of

__all__ = ["gram", "gram_fwd_kernel"]

# Rows whose products with as many others are kept in the registers of one program.
_ROWS = 8


@triton.jit
def gram_fwd_kernel(
    left: tl.tuple,
    right: tl.tuple,
    like: tl.tensor,
    partials: tl.tensor,
    numel: tl.tensor,
    A: tl.constexpr,
    B: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Write the products of A rows with B rows over one program's elements, (PADDED, PADDED) float64."""
    program = tl.program_id(0).to(tl.int64)
    from_left = as_pointers(left, like, ALIGNED, A, PADDED)
    from_right = as_pointers(right, like, ALIGNED, B, PADDED)
    has_left, has_right = is_there(left, A, PADDED), is_there(right, B, PADDED)
    sums = tl.zeros((PADDED, PADDED, BLOCK), tl.float64)
    for step in range(STEPS):
        index = ((program * STEPS + step) * BLOCK + tl.arange(0, BLOCK))[None, :]
        inside = index < numel
        a = upcast(tl.load(from_left + index, mask=inside & has_left, other=0.0), tl.float64)
        b = upcast(tl.load(from_right + index, mask=inside & has_right, other=0.0), tl.float64)
        sums += a[:, None, :] * b[None, :, :]
    rows = tl.arange(0, PADDED)
    place = partials + program * PADDED * PADDED + rows[:, None] * PADDED + rows[None, :]
    tl.store(place, tl.sum(sums, axis=2))


def _add_pair(columns: Sequence[Column], i: int, j: int, num_rows: int, result: Tensor) -> None:
    """Write the products of the rows from i on with those from j on, one matrix for each of the columns' groups."""
    left, right = slice(i, min(i + _ROWS, num_rows)), slice(j, min(j + _ROWS, num_rows))
    height, width = left.stop - i, right.stop - j
    padded = triton.next_power_of_2(max(height, width))
    launch = pick(GRAM, padded)
    counts = [-(-column.first.numel() // (launch.block * launch.steps)) for column in columns]
    partials = torch.empty(sum(counts), padded, padded, dtype=torch.float64, device=result.device)
    begin = 0
    for column, count in zip(columns, counts, strict=True):
        if count:
            at_left, at_right = addresses(column.rows[left]), addresses(column.rows[right])
            gram_fwd_kernel[(count,)](
                at_left,
                at_right,
                column.first,
                partials[begin:],
                column.first.numel(),
                A=height,
                B=width,
                ALIGNED=aligned(*at_left, *at_right),
                PADDED=padded,
                BLOCK=launch.block,
                STEPS=launch.steps,
                num_warps=launch.warps,
            )
        begin += count
    total = partials.sum(0)[:height, :width]
    result[left, right] = total
    if i != j:
        result[right, left] = total.T


def gram(rows: list[Tensor | None], num_rows: int, groups: list[int] | None = None) -> Tensor:
    """Return the Gram matrix, or one for each group; see :func:`fastmtl.ops.gram`.

    Up to 8 rows are read once; more are read by groups of 8, each once for every other group.
    """
    check_rows(rows, num_rows)
    num_groups = check_groups(groups, len(rows) // num_rows)
    result = torch.zeros(num_groups, num_rows, num_rows, dtype=torch.float64, device=device_of(rows))
    columns = list(dense_columns(rows, num_rows))
    firsts = range(0, num_rows, _ROWS)
    for group, matrix in enumerate(result):
        of_group = [column for column in columns if groups is None or groups[column.number] == group]
        for i, j in itertools.combinations_with_replacement(firsts, 2) if of_group else ():
            _add_pair(of_group, i, j, num_rows, matrix)
    # The two triangles of a pair of rows with itself are summed alike, but not by one order of the factors.
    result = result.triu() + result.triu(1).mT
    return result[0] if groups is None else result
