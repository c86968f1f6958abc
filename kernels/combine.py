"""combine and combine_ on Triton: each row read at most once per result, where it lies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastmtl.kernels._columns import Column, dense_columns, in_layout, upcast
from fastmtl.kernels._launch import COMBINE, pick
from torch import Tensor

from fastmtl.ops._rows import is_dense
from fastmtl.ops.combine import check_combine, check_combine_, empty_results

__all__ = ["combine", "combine_", "combine_fwd_kernel"]


@triton.jit
def combine_fwd_kernel(
    rows: tl.tuple,
    weights: tl.tensor,
    out: tl.tensor,
    numel: tl.tensor,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the weighted sum of ROWS rows; a row of weight 0 is not read."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    total = tl.zeros((BLOCK,), kind)
    if ACCUMULATE:
        total += upcast(tl.load(out + index, mask=inside, other=0.0), kind)
    for t in tl.static_range(ROWS):
        if rows[t] is not None:
            # Spread before it is compared: the interpreter cannot spread the result of comparing a scalar.
            weight = tl.zeros((BLOCK,), kind) + upcast(tl.load(weights + t), kind)
            total += weight * upcast(tl.load(rows[t] + index, mask=inside & (weight != 0), other=0.0), kind)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


def _launch(column: Column, weights: Tensor, out: Tensor, accumulate: bool) -> None:
    numel = out.numel()
    if numel == 0:
        return
    launch = pick(COMBINE, len(column.rows))
    combine_fwd_kernel[(triton.cdiv(numel, launch.block),)](
        tuple(column.rows),
        weights,
        out,
        numel,
        ROWS=len(column.rows),
        WIDE=torch.float64 in (out.dtype, column.first.dtype),
        ACCUMULATE=accumulate,
        BLOCK=launch.block,
        num_warps=launch.warps,
    )


def combine(rows: list[Tensor | None], num_rows: int, weights: Tensor, groups: list[int] | None = None) -> list[Tensor]:
    """Return the weighted sums; see :func:`fastmtl.ops.combine`."""
    check_combine(rows, num_rows, weights, groups)
    columns = list(dense_columns(rows, num_rows))
    results = empty_results(rows, num_rows, weights, groups)
    dense = weights.contiguous()
    per_result = dense[None] if weights.dim() == 1 or groups is not None else dense
    for number, result in enumerate(results):
        column = columns[number % len(columns)]
        one = per_result[number // len(columns)]
        _launch(column, one if groups is None else one[groups[column.number]], result, accumulate=False)
    return results


def combine_(
    out: list[Tensor],
    rows: list[Tensor | None],
    num_rows: int,
    weights: Tensor,
    groups: list[int] | None = None,
    accumulate: bool = False,
) -> None:
    """Write the weighted sums into ``out``, or add them; see :func:`fastmtl.ops.combine_`."""
    check_combine_(out, rows, num_rows, weights, groups)
    dense = weights.contiguous()
    columns = {column.number: column for column in dense_columns(rows, num_rows)}
    apart = {k: _apart(column, out) for k, column in columns.items()}
    for k, target in enumerate(out):
        if k not in columns:
            if not accumulate:
                target.zero_()
            continue
        column = apart[k]
        one = dense if groups is None else dense[groups[k]]
        result = target if is_dense(target) else target.contiguous()
        rows_like_result = (
            column.rows
            if result.stride() == column.first.stride()
            else [None if row is None else in_layout(row, result.stride(), row.dtype) for row in column.rows]
        )
        first = next(row for row in rows_like_result if row is not None)
        _launch(Column(k, rows_like_result, first), one, result, accumulate)
        if result is not target:
            target.copy_(result)


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()


def _apart(column: Column, out: list[Tensor]) -> Column:
    """Copy the rows that a write to some ``out`` would change before they are read.

    A row may be the very memory of its own ``out``: there every element is read before it is written.
    """
    spans = [(k, _span(target)) for k, target in enumerate(out) if target.numel() and is_dense(target)]

    def safe(row: Tensor) -> Tensor:
        begin, end = _span(row)
        for k, (first, last) in spans:
            itself = k == column.number and (begin, end) == (first, last) and row.stride() == out[k].stride()
            if begin < last and first < end and not itself:
                return torch.empty_strided(row.shape, row.stride(), dtype=row.dtype, device=row.device).copy_(row)
        return row

    rows = [None if row is None else safe(row) for row in column.rows]
    return Column(column.number, rows, next(row for row in rows if row is not None))
