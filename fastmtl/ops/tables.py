"""The rows of a table that a batch touches: which they are, and sums over all that touches each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._registry import declare
from fastmtl.ops._rows import check_float, sum_dtype

__all__ = ["group_rows", "sum_rows"]


def _check_ids(ids: Tensor) -> None:
    if ids.dim() != 1 or ids.dtype != torch.int64 or ids.layout != torch.strided:
        raise UsageError(f"ids must be (n,) int64, got shape {tuple(ids.shape)}, {ids.dtype}, {ids.layout}.")


def _check_not_negative(ids: Tensor) -> None:
    if ids.numel() and int(ids.min()) < 0:
        raise UsageError(f"ids must be at least 0, got {int(ids.min())}.")


def _group_reference(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    by_id = ids.sort(stable=True)
    rows, counts = torch.unique_consecutive(by_id.values, return_counts=True)
    starts = torch.zeros(len(rows) + 1, dtype=torch.int64, device=ids.device)
    starts[1:] = counts.cumsum(0)
    return rows, by_id.indices, starts


def _group_fake(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    touched = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(touched), ids.new_empty(ids.shape), ids.new_empty(touched + 1)


_group_rows = declare(
    "group_rows",
    "(Tensor ids) -> (Tensor, Tensor, Tensor)",
    check=_check_ids,
    reference=_group_reference,
    fake=_group_fake,
    check_contents=_check_not_negative,
)


def group_rows(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct ids, and where each occurs.

    On the CPU the ids are sorted by their digits. On CUDA there is no kernel of fastmtl: torch sorts them and finds
    where one differs from the next, and the host waits for the least id and for U.

    Args:
        ids: (n,) int64, at least 0.

    Returns:
        The U distinct ids in ascending order; the (n,) positions of all ids, grouped by id and ascending in each group;
        and (U + 1,) where each group starts, and n.

    Example:
        >>> group_rows(torch.tensor([7, 2, 7]))
        (tensor([2, 7]), tensor([1, 0, 2]), tensor([0, 1, 3]))
    """
    return _group_rows(ids)


def _check_sums(
    values: Sequence[Tensor], order: Tensor, starts: Tensor, source: Tensor | None = None, scale: Tensor | None = None
) -> None:
    if not values:
        raise UsageError("values must hold at least one tensor, got none.")
    first = values[0]
    for t, value in enumerate(values):
        check_float(f"values[{t}]", value, first.device)
        if value.dim() != 2 or value.shape != first.shape or value.dtype != first.dtype:
            raise UsageError(
                f"values[{t}] must be (m, d) with the shape and dtype of values[0], {tuple(first.shape)} "
                f"{first.dtype}, got {tuple(value.shape)} {value.dtype}."
            )
    for name, index in (("order", order), ("starts", starts), ("source", source)):
        if index is not None and (index.dim() != 1 or index.dtype != torch.int64 or index.device != first.device):
            raise UsageError(
                f"{name} must be one-dimensional int64 on {first.device}, got shape {tuple(index.shape)}, "
                f"{index.dtype} on {index.device}."
            )
    if source is not None and source.shape != order.shape:
        raise UsageError(f"source must have the shape {tuple(order.shape)} of order, got {tuple(source.shape)}.")
    if source is None and order.shape[0] > first.shape[0]:
        raise UsageError(f"order must have at most the {first.shape[0]} rows of values, got {order.shape[0]}.")
    if starts.shape[0] < 1:
        raise UsageError("starts must hold at least one number, got none.")
    if scale is not None:
        check_float("scale", scale, first.device)
        if scale.shape != order.shape:
            raise UsageError(f"scale must have the shape {tuple(order.shape)} of order, got {tuple(scale.shape)}.")


def _check_places(
    values: Sequence[Tensor], order: Tensor, starts: Tensor, source: Tensor | None = None, scale: Tensor | None = None
) -> None:
    ranges = [("order", order, len(order)), ("starts", starts, len(order) + 1)]
    if source is not None:
        ranges.append(("source", source, len(values[0])))
    for name, index, end in ranges:
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= end):
            raise UsageError(f"{name} must be from 0 to {end - 1}, got {int(index.min())} to {int(index.max())}.")
    if bool((starts.diff() < 0).any()):
        raise UsageError("starts must not fall.")


def _sums_reference(
    values: Sequence[Tensor], order: Tensor, starts: Tensor, source: Tensor | None = None, scale: Tensor | None = None
) -> list[Tensor]:
    groups = len(starts) - 1
    order = order[starts[0] : starts[-1]]
    # The group of each position.
    group = torch.repeat_interleave(torch.arange(groups, device=order.device), starts.diff(), output_size=len(order))
    taken = order if source is None else source[order]
    sums = []
    for value in values:
        dtype = sum_dtype(value.dtype)
        part = value[taken].to(dtype)
        if scale is not None:
            part = part * scale[order].to(dtype)[:, None]
        total = torch.zeros(groups, value.shape[1], dtype=dtype, device=value.device)
        sums.append(total.index_add_(0, group, part).to(value.dtype))
    return sums


def _sums_fake(
    values: Sequence[Tensor], order: Tensor, starts: Tensor, source: Tensor | None = None, scale: Tensor | None = None
) -> list[Tensor]:
    return [value.new_empty(starts.shape[0] - 1, value.shape[1]) for value in values]


_sum_rows = declare(
    "sum_rows",
    "(Tensor[] values, Tensor order, Tensor starts, Tensor? source=None, Tensor? scale=None) -> Tensor[]",
    check=_check_sums,
    reference=_sums_reference,
    fake=_sums_fake,
    check_contents=_check_places,
)


def sum_rows(
    values: Sequence[Tensor], order: Tensor, starts: Tensor, source: Tensor | None = None, scale: Tensor | None = None
) -> list[Tensor]:
    """Return for each of T tensors ``out_u = sum_j scale_j value[source_j]`` over the positions j of group u.

    With the groups of :func:`group_rows` this is what a table's rows get: of the ids of a batch, or of bags of ids
    whose sums' gradients are ``value``. Sums are taken in float32, in float64 for float64, in the order of the
    positions.

    Args:
        values: T tensors (m, d) of one shape and dtype.
        order: (n,) int64 positions, grouped.
        starts: (U + 1,) int64: where each group starts in ``order``, and where the last one ends.
        source: (n,) int64, by position: the row of ``value``; the position itself if None.
        scale: (n,) floats, by position; ones if None.

    Returns:
        T tensors (U, d).

    Example:
        >>> rows, order, starts = group_rows(torch.tensor([7, 2, 7]))
        >>> sum_rows([torch.tensor([[1.0], [2.0], [3.0]])], order, starts)
        [tensor([[2.],
                [4.]])]
    """
    return _sum_rows(values, order, starts, source, scale)
