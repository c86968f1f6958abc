"""More rows than a kernel takes: the same results from blocks of rows, some of which are read several times."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastmtl.ops._rows import MAX_ROWS, Flat, Groups, columns, empty_wide, sum_dtype

__all__ = ["gram_of_blocks", "row_blocks", "sum_of_blocks", "warn_of_blocks"]

_log = logging.getLogger("fastmtl")


def warn_of_blocks() -> None:
    """Warn once that rows are taken in blocks, which is slower."""
    if not torch.compiler.is_compiling():
        _warn()


@functools.cache
def _warn() -> None:
    _log.warning(
        "There are more than %d task gradients, which is what a kernel takes at once: they are multiplied and combined "
        "in blocks, which takes longer.",
        MAX_ROWS,
    )


def row_blocks(num_rows: int, most: int = MAX_ROWS) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each block of rows: as few blocks as possible, of nearly equal sizes."""
    count = -(-num_rows // most)
    for index in range(count):
        yield index * num_rows // count, (index + 1) * num_rows // count


def gram_of_blocks(
    gram: Callable[[Flat, int, Groups], Tensor], flat: Flat, num_rows: int, groups: Groups, num_groups: int
) -> Tensor:
    """Return the Gram matrix, (T, T) or (L, T, T), of more rows than ``gram`` takes, from those of pairs of blocks."""
    warn_of_blocks()
    width = len(flat) // num_rows
    result = empty_wide(flat, *(() if groups is None else (num_groups,)), num_rows, num_rows)
    blocks = [slice(*block) for block in row_blocks(num_rows, MAX_ROWS // 2)]
    for number, one in enumerate(blocks):
        for other in blocks[number + 1 :]:
            both = [*flat[one.start * width : one.stop * width], *flat[other.start * width : other.stop * width]]
            size = one.stop - one.start
            pair = gram(both, size + other.stop - other.start, groups)
            result[..., one, one], result[..., one, other] = pair[..., :size, :size], pair[..., :size, size:]
            result[..., other, one], result[..., other, other] = pair[..., size:, :size], pair[..., size:, size:]
    return result


def sum_of_blocks(
    combine_: Callable[[Sequence[Tensor], Flat, int, Tensor, Groups, bool], None],
    out: Sequence[Tensor],
    flat: Flat,
    num_rows: int,
    weights: Tensor,
    groups: Groups,
    accumulate: bool,
) -> None:
    """Write the weighted sum of more rows than ``combine_`` takes into ``out``, or add it."""
    warn_of_blocks()
    width = len(flat) // num_rows
    # Sums of blocks in bfloat16 would be rounded once for each; and out may be one of the rows.
    totals = [
        torch.empty_like(target, dtype=sum_dtype(target.dtype, *(row.dtype for _, row in column)))
        for target, column in zip(out, columns(flat, num_rows), strict=True)
    ]
    for first, end in row_blocks(num_rows):
        block = flat[first * width : end * width]
        combine_(totals, block, end - first, weights[..., first:end], groups, first > 0)
    for target, total in zip(out, totals, strict=True):
        target.copy_(total + target if accumulate else total)
