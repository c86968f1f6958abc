"""Moving averages of the task gradients and their Gram matrix, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtl.ops._blocks import row_blocks
from fastmtl.ops._registry import declare
from fastmtl.ops._rows import MAX_ROWS, Flat, Rows, check_per_row, check_state, device_of, empty_wide, pairs, updated
from fastmtl.ops.gram import gram_of_flat, gram_reference
from fastmtl.support.dtypes import wide_dtype

__all__ = ["ema_gram_"]


def _check_ema(state: Sequence[Tensor], rows: Flat, num_rows: int, keep: Tensor, gains: Tensor) -> None:
    check_state("state", state, rows, num_rows)
    device = device_of(state)
    check_per_row("keep", keep, num_rows, device)
    check_per_row("gains", gains, num_rows, device)


def _ema_reference(state: Sequence[Tensor], rows: Flat, num_rows: int, keep: Tensor, gains: Tensor) -> Tensor:
    dtype = wide_dtype(device_of(state))
    keep, gains = keep.to(dtype), gains.to(dtype)
    for t, average, row in pairs(state, rows, num_rows):
        value = average.to(dtype) * keep[t]
        average.copy_(value if row is None else value + row.to(dtype) * gains[t])
    return gram_reference(state, num_rows)


_ema_gram_ = declare(
    "ema_gram_",
    "(Tensor(a!)[] state, Tensor?[] rows, int num_rows, Tensor keep, Tensor gains) -> Tensor",
    check=_check_ema,
    reference=_ema_reference,
    fake=lambda state, rows, num_rows, keep, gains: empty_wide(state, num_rows, num_rows),
)


def _ema_of_any(state: Sequence[Tensor], rows: Flat, num_rows: int, keep: Tensor, gains: Tensor) -> Tensor:
    if num_rows <= MAX_ROWS:
        return _ema_gram_(state, rows, num_rows, keep, gains)
    # A block that is refused would come after those before it are written.
    _check_ema(state, rows, num_rows, keep, gains)
    width = len(rows) // num_rows
    for first, end in row_blocks(num_rows):
        block = slice(first * width, end * width)
        _ema_gram_(state[block], rows[block], end - first, keep[first:end], gains[first:end])
    return gram_of_flat(state, num_rows)


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
    return updated(_ema_of_any, state, rows, keep, gains)
