"""Sums of squares of the task gradients and the risks they give, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._blocks import row_blocks, warn_of_blocks
from fastmtl.ops._registry import declare
from fastmtl.ops._rows import MAX_ROWS, Flat, Rows, check_state, empty_wide, pairs, updated

__all__ = ["excess_risk_"]


def _check_risk(sums: Sequence[Tensor], rows: Flat, num_rows: int, epsilon: float) -> None:
    check_state("sums", sums, rows, num_rows)
    if not epsilon > 0:
        raise UsageError(f"epsilon must be above 0, got {epsilon}.")


def _risk_reference(sums: Sequence[Tensor], rows: Flat, num_rows: int, epsilon: float) -> Tensor:
    risks = empty_wide(sums, num_rows).zero_()
    dtype = risks.dtype
    for t, total, row in pairs(sums, rows, num_rows):
        if row is not None:
            square = row.to(dtype) ** 2
            total.copy_(total.to(dtype) + square)
            risks[t] += (square / (total.to(dtype) + epsilon).sqrt()).sum()
    return risks


_excess_risk_ = declare(
    "excess_risk_",
    "(Tensor(a!)[] sums, Tensor?[] rows, int num_rows, float epsilon) -> Tensor",
    check=_check_risk,
    reference=_risk_reference,
    fake=lambda sums, rows, num_rows, epsilon: empty_wide(sums, num_rows),
)


def _risk_of_any(sums: Sequence[Tensor], rows: Flat, num_rows: int, epsilon: float) -> Tensor:
    if num_rows <= MAX_ROWS:
        return _excess_risk_(sums, rows, num_rows, epsilon)
    # A block that is refused would come after those before it are written.
    _check_risk(sums, rows, num_rows, epsilon)
    warn_of_blocks()
    width = len(rows) // num_rows
    cuts = [(slice(a * width, b * width), b - a) for a, b in row_blocks(num_rows)]
    return torch.cat([_excess_risk_(sums[block], rows[block], size, epsilon) for block, size in cuts])


def excess_risk_(sums: Rows, rows: Rows, epsilon: float = 1e-7) -> Tensor:
    """Add the squared gradients to ``sums`` and return each task's excess risk, sum_i g_i^2 / sqrt(sums_i + epsilon).

    The rows are read once, the sums are read and written once. Everything is taken in float32, in float64 if the sums
    or a row of the parameter are float64, and risks are summed in float64 across short runs; they are computed from
    the new sums as stored.

    Args:
        sums: State, updated in place, as :func:`ema_gram_` takes it.
        rows: T lists of K gradients of these shapes, None for zero, or a (T, P) tensor.
        epsilon: Keeps the root away from zero.

    Source:
        He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024.

    Example:
        >>> sums = torch.tensor([[0.0, 12.0]])
        >>> excess_risk_(sums, torch.tensor([[3.0, 2.0]]))
        tensor([4.0000], dtype=torch.float64)
        >>> sums
        tensor([[ 9., 16.]])
    """
    return updated(_risk_of_any, sums, rows, epsilon)
