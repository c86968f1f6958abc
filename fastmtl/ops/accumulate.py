"""State that task gradients are added to and what follows from it, in one pass: moving averages, sums of squares."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.ops._registry import declare
from fastmtl.ops._rows import Flat, Rows, check_per_row, check_state, device_of, empty_wide, pairs, updated
from fastmtl.ops.gram import gram_reference
from fastmtl.support.dtypes import wide_dtype

__all__ = ["ema_gram_", "excess_risk_"]


def _check_ema(state: Sequence[Tensor], rows: Flat, num_rows: int, keep: Tensor, gains: Tensor) -> None:
    check_state("state", state, rows, num_rows)
    device = device_of(state)
    check_per_row("keep", keep, num_rows, device)
    check_per_row("gains", gains, num_rows, device)


def _ema_reference(state: Sequence[Tensor], rows: Flat, num_rows: int, keep: Tensor, gains: Tensor) -> Tensor:
    dtype = wide_dtype(device_of(state))
    keep, gains = keep.to(dtype), gains.to(dtype)
    for t, own, row in pairs(state, rows, num_rows):
        value = own.to(dtype) * keep[t]
        own.copy_(value if row is None else value + row.to(dtype) * gains[t])
    return gram_reference(state, num_rows)


def _check_risk(sums: Sequence[Tensor], rows: Flat, num_rows: int, epsilon: float) -> None:
    check_state("sums", sums, rows, num_rows)
    if not epsilon > 0:
        raise UsageError(f"epsilon must be above 0, got {epsilon}.")


def _risk_reference(sums: Sequence[Tensor], rows: Flat, num_rows: int, epsilon: float) -> Tensor:
    risks = empty_wide(sums, num_rows).zero_()
    dtype = risks.dtype
    for t, own, row in pairs(sums, rows, num_rows):
        if row is not None:
            square = row.to(dtype) ** 2
            own.copy_(own.to(dtype) + square)
            risks[t] += (square / (own.to(dtype) + epsilon).sqrt()).sum()
    return risks


_ema_gram_ = declare(
    "ema_gram_",
    "(Tensor(a!)[] state, Tensor?[] rows, int num_rows, Tensor keep, Tensor gains) -> Tensor",
    check=_check_ema,
    reference=_ema_reference,
    fake=lambda state, rows, num_rows, keep, gains: empty_wide(state, num_rows, num_rows),
)
_excess_risk_ = declare(
    "excess_risk_",
    "(Tensor(a!)[] sums, Tensor?[] rows, int num_rows, float epsilon) -> Tensor",
    check=_check_risk,
    reference=_risk_reference,
    fake=lambda sums, rows, num_rows, epsilon: empty_wide(sums, num_rows),
)


def ema_gram_(state: Rows, rows: Rows, keep: Tensor, gains: Tensor) -> Tensor:
    """Set ``state_t = keep_t state_t + gains_t row_t`` and return the (T, T) Gram matrix of the new state.

    The rows are read once, the state is read and written once; on CUDA, where there are more than 8 rows or not all is
    float32, the Gram matrix reads it once more. The update is taken in float32, in float64 if the state or a row of the
    parameter is float64; the Gram matrix is that of the state as it is then stored, summed as in
    :func:`fastmtl.ops.gram`.

    Args:
        state: T lists of K tensors, or a (T, P) tensor, updated in place. Tensor k has one shape and one dense layout
            in all rows. None of them may overlap another one or a gradient.
        rows: T lists of K gradients of these shapes, None for zero, or a (T, P) tensor.
        keep: (T,) factors of the old state, or one for all rows, on the device of the rows.
        gains: (T,) factors of the gradients.

    Example:
        >>> state = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> ema_gram_(state, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor(0.5), torch.tensor([0.5, 0.5]))
        tensor([[2., 2.],
                [2., 2.]], dtype=torch.float64)
        >>> state
        tensor([[1., 1.],
                [1., 1.]])
    """
    if keep.dim() == 0:
        keep = keep.expand(len(rows))
    return updated(_ema_gram_, state, rows, keep, gains)


def excess_risk_(sums: Rows, rows: Rows, epsilon: float = 1e-7) -> Tensor:
    """Add the squared gradients to ``sums`` and return each task's excess risk, sum_i g_i^2 / sqrt(sums_i + epsilon).

    The rows are read once, the sums are read and written once. Everything is taken in float32, in float64 if the sums
    or a row of the parameter are float64, and risks are summed in float64 across short runs; the sums that count are
    the new ones, as they are stored.

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
    return updated(_excess_risk_, sums, rows, epsilon)
