"""pcgrad on Triton, for up to 32 tasks: a program for each Gram matrix advances all projected gradients together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastmtl.kernels._columns import upcast
from torch import Tensor

from fastmtl.ops._orders import check_orders
from fastmtl.ops._registry import implementation
from fastmtl.ops._square import check_gram

__all__ = ["pcgrad", "pcgrad_fwd_kernel"]

_MAX_TASKS = 32


@triton.jit
def pcgrad_fwd_kernel(
    gram: tl.tensor,
    orders: tl.tensor,
    weights: tl.tensor,
    STEPS: tl.constexpr,
    TASKS: tl.constexpr,
    PADDED: tl.constexpr,
    BY_KEY: tl.constexpr,
) -> None:
    """Write PCGrad's weights, the column sums of the coefficients of all projected gradients, for each program's G."""
    gram += tl.program_id(0) * TASKS * TASKS
    weights += tl.program_id(0) * TASKS
    task = tl.arange(0, PADDED)
    real = task < TASKS
    both = real[:, None] & real[None, :]
    place = task[:, None] * TASKS + task[None, :]
    matrix = tl.load(gram + place, mask=both, other=0.0)
    faults = tl.sum(tl.sum((tl.abs(matrix) < float("inf")).to(tl.int32), axis=1), axis=0)
    rank = tl.zeros((PADDED, PADDED), tl.int32)
    if BY_KEY:
        key = upcast(tl.load(orders + place, mask=both, other=0.0), tl.float64)
        for k in range(TASKS):
            other = upcast(tl.load(orders + task * TASKS + k, mask=real, other=0.0), tl.float64)[:, None]
            # NaN comes last, and equal keys by number.
            both_nan = (other != other) & (key != key)
            smaller = (other < key) | ((other == other) & (key != key))
            equal = (other == key) | both_nan
            rank += (smaller | (equal & (k < task[None, :]))).to(tl.int32)
    coefficients = tl.where((task[:, None] == task[None, :]) & both, 1.0, 0.0).to(tl.float64)
    for step in range(STEPS):
        if BY_KEY:
            others = tl.sum(tl.where((rank == step) & both, task[None, :], 0), axis=1).to(tl.int64)
        else:
            others = tl.load(orders + task * STEPS + step, mask=real, other=0)
        valid = real & (others >= 0) & (others < TASKS)
        rows = tl.load(gram + others[:, None] * TASKS + task[None, :], mask=valid[:, None] & real[None, :], other=0.0)
        square = tl.load(gram + others * TASKS + others, mask=valid, other=0.0)
        rows = tl.where(tl.abs(rows) < float("inf"), rows, 0.0)
        product = tl.sum(coefficients * rows, axis=1)
        conflict = valid & (product < 0) & (square > 0) & (square < float("inf"))
        amount = tl.where(conflict, -product / tl.where(conflict, square, 1.0), 0.0)
        coefficients += tl.where(task[None, :] == others[:, None], amount[:, None], 0.0)
    total = tl.sum(coefficients, axis=0)
    total = tl.where(faults == PADDED * PADDED, total, float("nan"))
    tl.store(weights + task, total, mask=real)


def pcgrad(gram: Tensor, orders: Tensor) -> Tensor:
    """Return PCGrad's weights; see :func:`fastmtl.ops.pcgrad`. More than 32 tasks run on torch operators."""
    check_gram(gram)
    check_orders(orders, gram)
    tasks = gram.shape[-1]
    if tasks > _MAX_TASKS:
        return implementation("pcgrad", "reference")(gram, orders)
    weights = torch.empty(gram.shape[:-1], dtype=torch.float64, device=gram.device)
    pcgrad_fwd_kernel[(weights.numel() // tasks,)](
        gram.double().contiguous(),
        orders.contiguous(),
        weights,
        STEPS=orders.shape[1],
        TASKS=tasks,
        PADDED=triton.next_power_of_2(tasks),
        BY_KEY=orders.is_floating_point(),
        num_warps=1 if tasks <= 8 else 4,
    )
    return weights
