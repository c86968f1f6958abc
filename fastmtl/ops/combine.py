"""Weighted sums of the task gradients, w^T J, without ever building J."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._blocks import sum_of_blocks
from fastmtl.ops._registry import declare
from fastmtl.ops._rows import (
    MAX_ROWS,
    Flat,
    Groups,
    Rows,
    check_groups,
    check_rows,
    columns,
    device_of,
    empty_sum,
    flatten,
    is_dense,
    present,
    sum_dtype,
)
from fastmtl.ops._touched import are_sparse, compacted, dense_sum, sparse_rows

__all__ = ["check_combine", "check_combine_", "combine", "combine_", "empty_results"]


def _check_out(out: Sequence[Tensor], rows: Flat, num_rows: int) -> None:
    width = len(rows) // num_rows
    if len(out) != width:
        raise UsageError(f"out must hold one tensor for each of the {width} tensors of a row, got {len(out)}.")
    device = device_of(rows)
    for k, (target, column) in enumerate(zip(out, columns(rows, num_rows), strict=True)):
        if not target.is_floating_point() or target.layout != torch.strided:
            raise UsageError(f"out[{k}] must be a dense floating-point tensor, got {target.dtype}, {target.layout}.")
        for _, row in column[:1]:
            if target.shape != row.shape or target.device != device:
                raise UsageError(
                    f"out[{k}] must have shape {tuple(row.shape)} on {device} as its rows, "
                    f"got {tuple(target.shape)} on {target.device}."
                )
        if target.numel() > 1 and any(s == 0 and n > 1 for s, n in zip(target.stride(), target.shape, strict=True)):
            raise UsageError(f"out[{k}] must not be expanded: several of its elements share one place in memory.")


def _check_apart(out: Sequence[Tensor]) -> None:
    blocks = sorted(
        (target.data_ptr(), target.data_ptr() + target.numel() * target.element_size(), k)
        for k, target in enumerate(out)
        if target.numel() and is_dense(target)
    )
    for (_, end, k), (begin, _, other) in itertools.pairwise(blocks):
        if begin < end:
            raise UsageError(f"out[{k}] and out[{other}] must not overlap in memory.")


def check_combine(rows: Flat, num_rows: int, weights: Tensor, groups: Groups = None, many: bool = True) -> None:
    """Refuse with a UsageError what ``combine`` does not take, or several sums unless ``many``."""
    check_rows(rows, num_rows)
    _check_weights(rows, num_rows, weights, groups, many)


def _check_weights(rows: Flat, num_rows: int, weights: Tensor, groups: Groups, many: bool) -> None:
    num_groups = check_groups(groups, len(rows) // num_rows)
    if not weights.is_floating_point():
        raise UsageError(f"weights must be floating point, got {weights.dtype}.")
    if groups is not None:
        allowed, fits = f"({num_groups}, {num_rows})", weights.shape == (num_groups, num_rows)
    else:
        allowed = f"({num_rows},)" + (f" or (M, {num_rows})" if many else "")
        fits = 1 <= weights.dim() <= 1 + many and weights.shape[-1] == num_rows
    if not fits:
        raise UsageError(f"weights must have the shape {allowed}, got {tuple(weights.shape)}.")


def _check_into(
    out: Sequence[Tensor], rows: Flat, num_rows: int, weights: Tensor, groups: Groups = None, accumulate: bool = False
) -> None:
    check_combine(rows, num_rows, weights, groups, many=False)
    _check_out(out, rows, num_rows)


def check_combine_(out: Sequence[Tensor], rows: Flat, num_rows: int, weights: Tensor, groups: Groups) -> None:
    """Refuse with a UsageError what ``combine_`` does not take."""
    _check_into(out, rows, num_rows, weights, groups)
    _check_apart(out)


def empty_results(rows: Flat, num_rows: int, weights: Tensor, groups: Groups = None) -> list[Tensor]:
    """Return the empty tensors that ``combine`` fills."""
    return [result for result, _, _ in _results(rows, num_rows, weights, groups)]


def _results(
    rows: Flat, num_rows: int, weights: Tensor, groups: Groups
) -> Iterator[tuple[Tensor, Tensor, list[tuple[int, Tensor]]]]:
    """Yield an empty result, its (T,) weights and its rows, for every result and every parameter that has a row."""
    per_result = weights[None] if weights.dim() == 1 or groups is not None else weights
    for one in per_result:
        for k, column in enumerate(columns(rows, num_rows)):
            if column:
                yield empty_sum([row for _, row in column]), one if groups is None else one[groups[k]], column


def _weighted_sum(weights: Tensor, column: list[tuple[int, Tensor]], dtype: torch.dtype) -> Tensor:
    """Return the sum in ``dtype`` without the rows of weight zero."""
    weights = weights.to(column[0][1].device, dtype)
    total = torch.zeros(column[0][1].shape, dtype=dtype, device=column[0][1].device)
    for t, row in column:
        total += torch.where(weights[t] == 0, 0.0, row.to(dtype) * weights[t])
    return total


def _reference(rows: Flat, num_rows: int, weights: Tensor, groups: Groups = None) -> list[Tensor]:
    return [
        result.copy_(_weighted_sum(row_weights, column, sum_dtype(result.dtype)))
        for result, row_weights, column in _results(rows, num_rows, weights, groups)
    ]


def _reference_(
    out: Sequence[Tensor], rows: Flat, num_rows: int, weights: Tensor, groups: Groups = None, accumulate: bool = False
) -> None:
    totals = []
    for k, (target, column) in enumerate(zip(out, columns(rows, num_rows), strict=True)):
        dtype = sum_dtype(target.dtype, *(row.dtype for _, row in column))
        total = torch.zeros_like(target, dtype=dtype)
        if column:
            total = _weighted_sum(weights if groups is None else weights[groups[k]], column, dtype)
        totals.append(total + target if accumulate else total)
    # All sums are taken before the first write: out may be one of the rows.
    for target, total in zip(out, totals, strict=True):
        target.copy_(total)


_combine = declare(
    "combine",
    "(Tensor?[] rows, int num_rows, Tensor weights, int[]? groups=None) -> Tensor[]",
    check=lambda rows, num_rows, weights, groups=None: check_combine(rows, num_rows, weights, groups),
    reference=_reference,
    fake=empty_results,
)
_combine_ = declare(
    "combine_",
    "(Tensor(a!)[] out, Tensor?[] rows, int num_rows, Tensor weights, int[]? groups=None, bool accumulate=False) -> ()",
    check=_check_into,
    reference=_reference_,
    fake=lambda *args, **kwargs: None,
    check_contents=lambda out, *args, **kwargs: _check_apart(out),
)


def _sum_into(
    out: Sequence[Tensor], flat: Flat, num_rows: int, weights: Tensor, groups: Groups, accumulate: bool
) -> None:
    if num_rows <= MAX_ROWS:
        _combine_(out, flat, num_rows, weights, groups, accumulate)
        return
    # Blocks are written to sums of their own: out is checked here, and before anything is written.
    _check_into(out, flat, num_rows, weights, groups)
    if not torch.compiler.is_compiling():
        _check_apart(out)
    sum_of_blocks(_combine_, out, flat, num_rows, weights, groups, accumulate)


def _sums(flat: Flat, num_rows: int, weights: Tensor, groups: Groups) -> list[Tensor]:
    """Return the result of the op ``combine`` for any number of rows."""
    if num_rows <= MAX_ROWS:
        return _combine(flat, num_rows, weights, groups)
    check_combine(flat, num_rows, weights, groups)
    there = [k for k, known in enumerate(present(flat, num_rows)) if known]
    width = len(flat) // num_rows
    known = [flat[t * width + k] for t in range(num_rows) for k in there]
    some = None if groups is None else [groups[k] for k in there]
    results = empty_results(flat, num_rows, weights, groups)
    for number, one in enumerate(weights[None] if weights.dim() == 1 or groups is not None else weights):
        out = results[number * len(there) : (number + 1) * len(there)]
        of_groups = one if some is None else one[: max(some, default=-1) + 1]
        sum_of_blocks(_combine_, out, known, num_rows, of_groups, some, False)
    return results


def _sparse_sums(flat: Flat, num_rows: int, weights: Tensor, groups: Groups, has_row: Sequence[bool]) -> list[Tensor]:
    """Return :func:`_sums`, sparse where all gradients of a parameter are."""
    flat, touched = compacted(flat, num_rows)
    of_sums = [places for places, known in zip(touched, has_row, strict=True) if known]
    sums = _sums(flat, num_rows, weights, groups)
    return sparse_rows(sums, of_sums * (len(sums) // max(1, len(of_sums))))


def _sparse_sum_into(
    out: Sequence[Tensor], flat: Flat, num_rows: int, weights: Tensor, groups: Groups, accumulate: bool
) -> None:
    """Do what :func:`_sum_into` does, of sparse gradients too."""
    flat, touched = compacted(flat, num_rows)
    check_combine(flat, num_rows, weights, groups, many=False)
    width = len(touched)
    if len(out) != width:
        raise UsageError(f"out must hold one tensor for each of the {width} tensors of a row, got {len(out)}.")
    sparse = [(k, places) for k, places in enumerate(touched) if places is not None]
    for k, places in sparse:
        if out[k].layout != torch.strided or out[k].shape != places.shape:
            raise UsageError(
                f"out[{k}] must be a dense tensor of shape {tuple(places.shape)}, got {out[k].layout} of shape "
                f"{tuple(out[k].shape)}."
            )
    dense = [k for k, places in enumerate(touched) if places is None]
    _sum_into([out[k] for k in dense], *_some(flat, num_rows, weights, groups, dense), accumulate)
    sums = _sums(*_some(flat, num_rows, weights, groups, [k for k, _ in sparse]))
    for (k, places), total in zip(sparse, sums, strict=True):
        dense_sum(out[k], total, places, accumulate)


def _some(
    flat: Flat, num_rows: int, weights: Tensor, groups: Groups, some: Sequence[int]
) -> tuple[Flat, int, Tensor, Groups]:
    """Return the arguments of an op for some of the K parameters."""
    width = len(flat) // num_rows
    rows = [flat[t * width + k] for t in range(num_rows) for k in some]
    if groups is None:
        return rows, num_rows, weights, None
    of_some = [groups[k] for k in some]
    return rows, num_rows, weights[: max(of_some, default=-1) + 1], of_some


def combine(rows: Rows, weights: Tensor, groups: Groups = None) -> list[Tensor | None] | list[list[Tensor | None]]:
    """Return sum_t w_t row_t, one new tensor per parameter.

    The sum is taken in float32, in float64 if a row of the parameter is float64; the result has the promoted dtype of
    the rows, and their memory layout if they share a dense one. A row whose weight is exactly 0 is not read, so what it
    holds, NaN included, does not matter. In a training loop :func:`combine_` is faster: large new tensors cost the
    system more than the sums.

    Args:
        rows: T lists of K gradients, dense or sparse in COO layout, or a (T, P) tensor, which counts as K = 1.
        weights: (T,) for one sum, (M, T) for M sums that share one pass over the rows; with groups (L, T).
        groups: For each of the K tensors the row of ``weights`` that applies to it.

    Returns:
        K tensors, or M lists of K for (M, T) weights. A parameter that is None in all rows stays None; sums of sparse
        rows are sparse, with each index that some row touches once.

    Example:
        >>> rows = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]]
        >>> combine(rows, torch.tensor([0.5, 0.5]))
        [tensor([2.0000, 0.5000])]
    """
    flat, num_rows = flatten(rows)
    has_row = present(flat, num_rows)
    sums = iter(
        _sparse_sums(flat, num_rows, weights, groups, has_row)
        if are_sparse(flat)
        else _sums(flat, num_rows, weights, groups)
    )
    if weights.dim() == 1 or groups is not None:
        return [next(sums) if known else None for known in has_row]
    return [[next(sums) if known else None for known in has_row] for _ in weights]


def combine_(
    out: Sequence[Tensor], rows: Rows, weights: Tensor, groups: Groups = None, accumulate: bool = False
) -> None:
    """Write sum_t w_t row_t into given tensors, or add it to them.

    Args:
        out: K dense tensors of the shapes of the rows, of any float dtype and strides. One may be a row itself (the
            very same memory); two of them must not overlap.
        rows: T lists of K gradients, or a (T, P) tensor with one (P,) ``out``.
        weights: (T,) or, with groups, (L, T). A row whose weight is exactly 0 is not read.
        groups: For each of the K tensors the row of ``weights`` that applies to it.
        accumulate: Add to what is there instead of overwriting it. Where a parameter is None in all rows, ``out``
            becomes zero without ``accumulate`` and stays as it is with it.

    Example:
        >>> out = [torch.zeros(2)]
        >>> combine_(out, [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]], torch.tensor([1.0, 1.0]))
        >>> out
        [tensor([4., 1.])]
    """
    flat, num_rows = flatten(rows)
    (_sparse_sum_into if are_sparse(flat) else _sum_into)(out, flat, num_rows, weights, groups, accumulate)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)
