"""graddrop and graddrop_rows on Triton, for up to 32 tasks: a program holds some features of all tasks."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from fastmtl.kernels._columns import (
    addresses,
    aligned,
    as_pointers,
    as_vector,
    dense_columns,
    in_layout,
    is_there,
    upcast,
)
from fastmtl.kernels._launch import GRADDROP, pick
from torch import Tensor

from fastmtl.ops._registry import implementation
from fastmtl.ops.graddrop import (
    check_graddrop,
    check_graddrop_rows,
    empty_results,
    empty_row_results,
    feature_strides,
)

__all__ = ["graddrop", "graddrop_fwd_kernel_batch", "graddrop_fwd_kernel_rows", "graddrop_rows"]

# Features of all tasks must fit in the registers of one program; more tasks run on torch operators.
_MAX_TASKS = 32


@triton.jit
def _draw(random: tl.tensor, first: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return 2 u - 1 for the BLOCK numbers of a stream from ``first``, a multiple of 4, on."""
    seed = tl.load(random)
    offset = tl.load(random + 1)
    block = first // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
    zero = tl.zeros((BLOCK // 4,), tl.int64)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = ((block >> 32) & 0xFFFFFFFF).to(tl.uint32)
    offset_low = ((zero + offset) & 0xFFFFFFFF).to(tl.uint32)
    offset_high = (((zero + offset) >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, offset_low, offset_high)
    # Joined so that the four words of a block stand side by side.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    return (words >> 8).to(tl.float32) * (2.0 * 2.0**-24) - 1.0


@triton.jit
def _factors(sums: tl.tensor, centred: tl.tensor, leak: tl.tensor) -> tl.tensor:
    """Return the factor of each (task, feature): 1 where its sign is kept, else the leak; a NaN sum keeps none."""
    total = tl.sum(sums, axis=0)
    limit = centred.to(sums.dtype) * tl.sum(tl.abs(sums), axis=0)
    sign = tl.where(total > limit, 1.0, tl.where(total < limit, -1.0, 0.0)).to(sums.dtype)
    return tl.where(sums * sign[None, :] > 0, 1.0, leak).to(sums.dtype)


@triton.jit(do_not_specialize=["largest"])
def graddrop_fwd_kernel_batch(
    reps: tl.tuple,
    grads: tl.tuple,
    outs: tl.tuple,
    sizes_16: tl.tuple,
    like_rep: tl.tensor,
    like_grad: tl.tensor,
    like_out: tl.tensor,
    random: tl.tensor,
    noise: tl.tensor,
    leak: tl.float64,
    features: tl.tensor,
    largest: tl.tensor,
    TASKS: tl.constexpr,
    PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED: tl.constexpr,
    GIVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Drop the gradients of BLOCK features, over the batches of all tasks."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    feature = first + tl.arange(0, BLOCK)
    inside = (feature < features)[None, :]
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    at_rep = as_pointers(reps, like_rep, ALIGNED, TASKS, PADDED)
    at_grad = as_pointers(grads, like_grad, ALIGNED, TASKS, PADDED)
    size = as_vector(sizes_16, 0, TASKS, PADDED)[:, None] // 16
    sums = tl.zeros((PADDED, BLOCK), kind)
    for b in range(largest):
        place = (b * features + feature)[None, :]
        mask = inside & (b < size)
        rep = upcast(tl.load(at_rep + place, mask=mask, other=0.0), kind)
        sign = tl.where(rep > 0, 1.0, tl.where(rep < 0, -1.0, rep)).to(kind)
        sums += upcast(tl.load(at_grad + place, mask=mask, other=0.0), kind) * sign
    if GIVEN:
        centred = 2.0 * tl.load(noise + feature, mask=feature < features, other=0.5) - 1.0
    else:
        centred = _draw(random, first, BLOCK)
    factor = _factors(sums, centred, leak)
    for b in range(largest):
        place = (b * features + feature)[None, :]
        mask = inside & (b < size)
        dropped = upcast(tl.load(at_grad + place, mask=mask, other=0.0), kind) * factor
        if SHARED:
            out = tl.cast(outs[0], tl.int64).to(like_out.dtype)
            value = tl.sum(dropped, axis=0).to(like_out.dtype.element_ty)
            tl.store(out + b * features + feature, value, mask=feature < features)
        else:
            at_out = as_pointers(outs, like_out, ALIGNED, TASKS, PADDED)
            tl.store(at_out + place, dropped.to(like_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_number"])
def graddrop_fwd_kernel_rows(
    rows: tl.tuple,
    like: tl.tensor,
    out: tl.tensor,
    random: tl.tensor,
    noise: tl.tensor,
    leak: tl.tensor,
    first_number: tl.tensor,
    numel: tl.tensor,
    TASKS: tl.constexpr,
    PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    GIVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Drop BLOCK elements of all rows and add up what stays."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    inside = index < numel
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    task = tl.arange(0, PADDED)
    at_row = as_pointers(rows, like, ALIGNED, TASKS, PADDED)
    mask = inside[None, :] & is_there(rows, TASKS, PADDED)
    grad = upcast(tl.load(at_row + index[None, :], mask=mask, other=0.0), kind)
    if GIVEN:
        centred = 2.0 * tl.load(noise + index, mask=inside, other=0.5) - 1.0
    else:
        centred = _draw(random, first_number + first, BLOCK)
    leaks = upcast(tl.load(leak + task, mask=task < TASKS, other=0.0), kind)
    kept = tl.sum(grad * _factors(grad, centred, leaks[:, None]), axis=0)
    tl.store(out + index, kept.to(out.dtype.element_ty), mask=inside)


def graddrop(
    reps: list[Tensor], grads: list[Tensor], leak: float, random: Tensor, noise: Tensor | None = None
) -> list[Tensor]:
    """Return the gradients after dropout; see :func:`fastmtl.ops.graddrop`. More than 32 tasks are left to torch."""
    check_graddrop(reps, grads, random, noise)
    tasks, shared = len(grads), len(reps) == 1
    if tasks > _MAX_TASKS:
        return implementation("graddrop", "reference")(reps, grads, leak, random, noise)
    shape = grads[0].shape[1:]
    features = shape.numel()
    inner = feature_strides([*reps, *grads])
    strides = (max(features, 1), *inner)
    results = empty_results(reps, grads)
    largest = max(len(grad) for grad in grads)
    if features == 0 or largest == 0:
        return results
    kinds = [_promoted(tensors) for tensors in (reps, grads, results)]
    dense_reps = [in_layout(rep, strides, kinds[0]) for rep in reps]
    dense_grads = [in_layout(grad, strides, kinds[1]) for grad in grads]
    outs = [in_layout(result, strides, kinds[2]) for result in results]
    if noise is not None:
        noise = in_layout(noise, inner, torch.float64)
    padded = triton.next_power_of_2(tasks)
    launch = pick(GRADDROP, padded)
    places = [addresses(tensors) for tensors in (dense_reps * tasks if shared else dense_reps, dense_grads, outs)]
    graddrop_fwd_kernel_batch[(triton.cdiv(features, launch.block),)](
        *places,
        # Times 16: Triton compiles anew for integers that are 1, and for those that are multiples of 16 and are not.
        tuple(16 * len(grad) for grad in grads),
        dense_reps[0],
        dense_grads[0],
        outs[0],
        random.contiguous(),
        random if noise is None else noise,
        leak,
        features,
        largest,
        TASKS=tasks,
        PADDED=padded,
        ALIGNED=aligned(*itertools.chain(*places)),
        SHARED=shared,
        GIVEN=noise is not None,
        WIDE=torch.float64 in kinds[1:],
        BLOCK=launch.block,
        num_warps=launch.warps,
    )
    for result, out in zip(results, outs, strict=True):
        if out is not result:
            result.copy_(out)
    return results


def _promoted(tensors: list[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def graddrop_rows(
    rows: list[Tensor | None], num_rows: int, leak: Tensor, random: Tensor, noise: list[Tensor]
) -> list[Tensor]:
    """Return the rows' sum after dropout; see :func:`fastmtl.ops.graddrop_rows`. More than 32 are left to torch."""
    check_graddrop_rows(rows, num_rows, leak, random, noise)
    if num_rows > _MAX_TASKS:
        return implementation("graddrop_rows", "reference")(rows, num_rows, leak, random, noise)
    results = empty_row_results(rows, num_rows)
    padded = triton.next_power_of_2(num_rows)
    launch = pick(GRADDROP, padded)
    first = 0
    for column, result in zip(dense_columns(rows, num_rows), results, strict=True):
        numel = result.numel()
        if numel:
            numbers = in_layout(noise[column.number], result.stride(), torch.float64) if noise else random
            places = addresses(column.rows)
            graddrop_fwd_kernel_rows[(triton.cdiv(numel, launch.block),)](
                places,
                column.first,
                result,
                random.contiguous(),
                numbers,
                leak.contiguous(),
                first,
                numel,
                TASKS=num_rows,
                PADDED=padded,
                ALIGNED=aligned(*places),
                GIVEN=bool(noise),
                WIDE=result.dtype == torch.float64,
                BLOCK=launch.block,
                num_warps=launch.warps,
            )
        first += triton.cdiv(numel, 4) * 4
    return results
