"""Gradient sign dropout: of the tasks' gradients of a feature, those of one sign stay."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._blocks import warn_of_blocks
from fastmtl.ops._philox import uniform
from fastmtl.ops._registry import declare, implementation
from fastmtl.ops._rows import (
    FLOAT_TYPES,
    MAX_ROWS,
    Flat,
    Rows,
    check_float,
    check_per_row,
    check_rows,
    columns,
    device_of,
    empty_sum,
    flatten,
    present,
    shared_strides,
)
from fastmtl.ops._touched import are_sparse, compacted, sparse_rows
from fastmtl.support.dtypes import wide_dtype

__all__ = [
    "check_graddrop",
    "check_graddrop_rows",
    "empty_results",
    "empty_row_results",
    "feature_strides",
    "graddrop",
    "graddrop_rows",
]


def _check_random(random: Tensor, device: torch.device) -> None:
    if random.shape != (2,) or random.dtype != torch.int64 or random.device != device:
        raise UsageError(
            f"random must hold seed and offset as (2,) int64 on {device}, "
            f"got shape {tuple(random.shape)}, {random.dtype} on {random.device}."
        )


def check_graddrop(reps: Sequence[Tensor], grads: Sequence[Tensor], random: Tensor, noise: Tensor | None) -> None:
    """Refuse with a UsageError what no backend of ``graddrop`` takes."""
    if not grads or len(reps) not in (1, len(grads)):
        raise UsageError(f"reps must hold one tensor or one for each of the {len(grads)} grads, got {len(reps)}.")
    device = grads[0].device
    for name, list_ in (("reps", reps), ("grads", grads)):
        for t, tensor in enumerate(list_):
            check_float(f"{name}[{t}]", tensor, device)
            if tensor.dim() < 1 or tensor.shape[1:] != grads[0].shape[1:]:
                raise UsageError(
                    f"{name}[{t}] must have the shape (batch, ...) with the features of grads[0], "
                    f"got {tuple(tensor.shape)} beside {tuple(grads[0].shape)}."
                )
    for t, grad in enumerate(grads):
        rep = reps[t if len(reps) > 1 else 0]
        if rep.shape != grad.shape:
            raise UsageError(
                f"grads[{t}] must have the shape {tuple(rep.shape)} of its representation, got {tuple(grad.shape)}."
            )
    _check_random(random, device)
    if noise is not None and (noise.shape != grads[0].shape[1:] or noise.dtype not in FLOAT_TYPES):
        raise UsageError(
            f"noise must be floats of the shape {tuple(grads[0].shape[1:])} of the features, "
            f"got {tuple(noise.shape)}, {noise.dtype}."
        )


def feature_strides(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the strides of the dimensions after the batch: the dense ones all tensors share, or contiguous ones."""
    shape = tensors[0].shape[1:]
    features = [torch.empty_strided(shape, t.stride()[1:], device="meta") for t in tensors]
    if all(len(t) == 1 or t.stride(0) == shape.numel() for t in tensors):
        return shared_strides(features)
    return torch.empty(shape, device="meta").stride()


def empty_results(reps: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Return empty results, one for each representation."""
    strides = feature_strides([*reps, *grads])
    outer = max(grads[0].shape[1:].numel(), 1)
    results = []
    for r, rep in enumerate(reps):
        summed = grads if len(reps) == 1 else grads[r : r + 1]
        dtype = functools.reduce(torch.promote_types, (grad.dtype for grad in summed))
        results.append(torch.empty_strided(rep.shape, (outer, *strides), dtype=dtype, device=rep.device))
    return results


def _kept(signed: Tensor, noise: Tensor) -> Tensor:
    """Return which of the signed sums (T, ...) are kept; a NaN among the sums of a feature keeps none of them."""
    purity = signed.sum(0) - (2 * noise.to(signed.dtype) - 1) * signed.abs().sum(0)
    return signed * purity.sign() > 0


def _sign(rep: Tensor) -> Tensor:
    """Return the sign of each element; NaN for NaN."""
    return torch.where(rep.isnan(), rep, rep.sign())


def _reference(
    reps: Sequence[Tensor], grads: Sequence[Tensor], leak: float, random: Tensor, noise: Tensor | None = None
) -> list[Tensor]:
    dtype = wide_dtype(grads[0].device)
    shape = grads[0].shape[1:]
    if noise is None:
        noise = uniform(random, 0, shape.numel()).as_strided(shape, feature_strides([*reps, *grads]))
    rep_of_task = list(reps) * len(grads) if len(reps) == 1 else reps
    wide = [grad.to(dtype) for grad in grads]
    signed = [(grad * _sign(rep.to(dtype))).sum(0) for grad, rep in zip(wide, rep_of_task, strict=True)]
    kept = _kept(torch.stack(signed), noise)
    dropped = [grad * torch.where(keep, 1.0, leak) for grad, keep in zip(wide, kept, strict=True)]
    if len(reps) == 1:
        dropped = [torch.stack(dropped).sum(0)]
    return [result.copy_(value) for result, value in zip(empty_results(reps, grads), dropped, strict=True)]


def check_graddrop_rows(rows: Flat, num_rows: int, leak: Tensor, random: Tensor, noise: Sequence[Tensor]) -> None:
    """Refuse with a UsageError what no backend of ``graddrop_rows`` takes."""
    check_rows(rows, num_rows)
    device = device_of(rows)
    check_per_row("leak", leak, num_rows, device)
    _check_random(random, device)
    if not noise:
        return
    width = len(rows) // num_rows
    if len(noise) != width:
        raise UsageError(f"noise must hold one tensor for each of the {width} tensors of a row, got {len(noise)}.")
    for k, column in enumerate(columns(rows, num_rows)):
        if column and (noise[k].shape != column[0][1].shape or noise[k].dtype not in FLOAT_TYPES):
            raise UsageError(
                f"noise[{k}] must be floats of the shape {tuple(column[0][1].shape)}, "
                f"got {tuple(noise[k].shape)}, {noise[k].dtype}."
            )


def empty_row_results(rows: Flat, num_rows: int) -> list[Tensor]:
    """Return empty results, one for each parameter that has a row."""
    return [empty_sum([row for _, row in column]) for column in columns(rows, num_rows) if column]


def _drawn(
    rows: Flat, num_rows: int, random: Tensor, noise: Sequence[Tensor]
) -> Iterator[tuple[list[tuple[int, Tensor]], Tensor, Tensor]]:
    """Yield, for each parameter that has a row: its rows with their tasks, an empty result, its random numbers."""
    first = 0
    for k, column in enumerate(columns(rows, num_rows)):
        if not column:
            continue
        result = empty_sum([row for _, row in column])
        drawn = uniform(random, first, result.numel()).as_strided(result.shape, result.stride())
        first += (result.numel() + 3) // 4 * 4
        yield column, result, noise[k] if noise else drawn


def _reference_rows(rows: Flat, num_rows: int, leak: Tensor, random: Tensor, noise: Sequence[Tensor]) -> list[Tensor]:
    dtype = wide_dtype(device_of(rows))
    written = []
    for column, result, numbers in _drawn(rows, num_rows, random, noise):
        wide = torch.stack([row.to(dtype) for _, row in column])
        leaks = leak.to(dtype)[[t for t, _ in column]].view(-1, *[1] * result.dim())
        kept = _kept(wide, numbers)
        written.append(result.copy_((wide * torch.where(kept, 1.0, leaks)).sum(0)))
    return written


_graddrop = declare(
    "graddrop",
    "(Tensor[] reps, Tensor[] grads, float leak, Tensor random, Tensor? noise=None) -> Tensor[]",
    check=lambda reps, grads, leak, random, noise=None: check_graddrop(reps, grads, random, noise),
    reference=_reference,
    fake=lambda reps, grads, leak, random, noise=None: empty_results(reps, grads),
)
_graddrop_rows = declare(
    "graddrop_rows",
    "(Tensor?[] rows, int num_rows, Tensor leak, Tensor random, Tensor[] noise) -> Tensor[]",
    check=check_graddrop_rows,
    reference=_reference_rows,
    fake=lambda rows, num_rows, leak, random, noise: empty_row_results(rows, num_rows),
)


def graddrop(
    reps: Sequence[Tensor], grads: Sequence[Tensor], leak: float, random: Tensor, noise: Tensor | None = None
) -> list[Tensor]:
    """Return the gradients of representations after gradient sign dropout.

    For each feature, s_t is the sum over the batch of ``grad_t sign(rep_t)`` and the purity is
    ``P = (1 + sum_t s_t / sum_t |s_t|) / 2``. For u uniform in [0, 1), positive s_t stay where P > u and negative ones
    where P < u: ``M_t`` is 1 there, else 0. The result is ``grad_t (leak + (1 - leak) M_t)``; with one representation
    for all tasks its sum over the tasks. Sums are taken in float32 or better. A feature with a NaN among its s_t has
    M_t = 0 for all tasks.

    Feature i, counted in the memory order of the features where all tensors share a dense one and else in that of
    contiguous tensors, gets number i of the Philox4x32-10 stream (seed, offset), the same on every backend.

    Args:
        reps: T representations (B_t, ...) with the same features, or one that all tasks share.
        grads: T gradients of them, of any float dtype.
        leak: Share of the dropped gradients that flows on.
        random: (2,) int64 seed and offset on the device of ``grads``; add 1 to the offset for the next numbers.
        noise: Numbers to use instead, of the shape of the features.

    Returns:
        One tensor per representation, of the dtype of its gradients.

    Source:
        Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020;
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Example:
        >>> reps, grads = [torch.ones(1, 2)], [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])]
        >>> graddrop(reps, grads, 0.0, torch.tensor([0, 0]), noise=torch.tensor([0.5, 0.5]))
        [tensor([[4., 2.]])]
    """
    if len(grads) <= MAX_ROWS or grads[0].device.type == "cpu":
        return _graddrop(reps, grads, leak, random, noise)
    warn_of_blocks()
    results: list[Tensor] = implementation("graddrop", "reference")(reps, grads, leak, random, noise)
    return results


def _drop_one_by_one(rows: Flat, num_rows: int, leak: Tensor, random: Tensor, noise: Sequence[Tensor]) -> list[Tensor]:
    """Return the result of ``graddrop_rows`` for many rows: two passes, each of which converts one row at a time."""
    warn_of_blocks()
    check_graddrop_rows(rows, num_rows, leak, random, noise)
    dtype = wide_dtype(device_of(rows))
    results = []
    for column, result, numbers in _drawn(rows, num_rows, random, noise):
        total = torch.zeros_like(result, dtype=dtype)
        size = torch.zeros_like(total)
        for _, row in column:
            total += row
            size += row.to(dtype).abs()
        sign = (total - (2 * numbers.to(dtype) - 1) * size).sign()
        total.zero_()
        for t, row in column:
            wide = row.to(dtype)
            total += wide * torch.where(wide * sign > 0, 1.0, leak[t].to(dtype))
        results.append(result.copy_(total))
    return results


def graddrop_rows(
    rows: Rows, leak: Tensor, random: Tensor, noise: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """Return the sum of the task gradients after gradient sign dropout, each element by itself.

    The rule is that of :func:`graddrop` with ``s_t = row_t``: the result is
    ``sum_t row_t (leak_t + (1 - leak_t) M_t)``. The elements of parameter k are counted in their memory order from a
    multiple of 4 on, behind those of the parameters before it.

    Args:
        rows: T lists of K gradients, dense or sparse in COO layout, or a (T, P) tensor. Of sparse ones only the entries
            that some row touches take part, and are counted.
        leak: (T,) share of each row's dropped elements that stays.
        random: (2,) int64 seed and offset on the device of the rows.
        noise: K tensors of the shapes of the rows to use instead.

    Returns:
        K tensors; None where a parameter is None in all rows.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
        >>> graddrop_rows(rows, torch.zeros(2), torch.tensor([0, 0]), noise=[torch.tensor([0.5, 0.5])])
        [tensor([4., 2.])]
    """
    flat, num_rows = flatten(rows)
    drop = _graddrop_rows if num_rows <= MAX_ROWS else _drop_one_by_one
    has_row = present(flat, num_rows)
    given = [] if noise is None else list(noise)
    if are_sparse(flat):
        flat, touched = compacted(flat, num_rows)
        given = [
            number if places is None else number[tuple(places.indices)]
            for number, places in zip(given, touched if given else (), strict=True)
        ]
        sums = drop(flat, num_rows, leak, random, given)
        results = iter(sparse_rows(sums, [at for at, known in zip(touched, has_row, strict=True) if known]))
    else:
        results = iter(drop(flat, num_rows, leak, random, given))
    return [next(results) if is_present else None for is_present in has_row]
