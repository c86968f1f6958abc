"""Gradients from Jacobians, by an aggregator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl.autojac.checks import check_distinct, check_rows
from fastmtl.autojac.fields import check_writable
from fastmtl.errors import UsageError

if TYPE_CHECKING:
    from fastmtl.aggregation import Aggregator

__all__ = ["jac_to_grad"]


@torch.no_grad()
def jac_to_grad(
    tensors: Iterable[Tensor],
    /,
    aggregator: Aggregator,
    *,
    retain_jac: bool = False,
    optimize_gramian_computation: bool = False,
) -> Tensor | None:
    """Aggregate the ``.jac`` fields of ``tensors`` and add the result to their ``.grad`` fields.

    The Jacobians are not concatenated: an aggregator with weights from the Gram matrix reads them once for the matrix
    and once for the weighted sum. The whole (T, P) matrix is built only for aggregators that need it, those with a
    forward hook on them or their ``weighting``, and derived classes that override ``forward``.

    Args:
        tensors: Tensors with a ``.jac`` field (T, ...), all with the same T.
        aggregator: Combines T gradients into one.
        retain_jac: Keep the ``.jac`` fields.
        optimize_gramian_computation: Refuse an aggregator that needs the (T, P) matrix.

    Returns:
        The (T,) weights, None if the aggregator has none.

    Raises:
        UsageError: No tensors, a repeated one, one without ``.jac``, different T, or ``optimize_gramian_computation``
            with an aggregator that needs the matrix.

    Example:
        >>> from fastmtl.aggregation import UPGrad
        >>> param = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> backward([param @ torch.tensor([-1.0, 1.0]), (param**2).sum()])
        >>> jac_to_grad([param], UPGrad())
        tensor([0.5000, 0.5000])
        >>> param.grad
        tensor([0.5000, 2.5000])
    """
    wanted = list(tensors)
    check_distinct(wanted, "tensors")
    if any(getattr(tensor, "jac", None) is None for tensor in wanted):
        raise UsageError("tensors must all have a .jac field: call backward or mtl_backward of fastmtl.autojac first.")
    jacobians: list[Tensor] = [tensor.jac for tensor in wanted]  # type: ignore[attr-defined]
    check_rows(jacobians, "tensors.jac")
    check_writable(wanted, ".grad")
    if optimize_gramian_computation and not aggregator.works_on_gram():
        raise UsageError(
            "optimize_gramian_computation needs an aggregator with weights from the Gram matrix and without "
            f"forward hooks or a forward of its own, got {aggregator}."
        )
    if not retain_jac:
        for tensor in wanted:
            del tensor.jac  # type: ignore[attr-defined]
    return aggregator.write(jacobians, wanted)
