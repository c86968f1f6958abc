"""Gradients from Jacobians, by an aggregator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl.autojac.checks import check_rows, unique
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
    and once for the weighted sum, which is written where the gradients are. A forward hook on the aggregator or on its
    ``weighting`` wants the whole (T, P) matrix, which is then built for it; so does a derived class with a ``forward``
    of its own.

    Args:
        tensors: Tensors with a ``.jac`` field (T, ...), all with the same T.
        aggregator: What makes one gradient of T.
        retain_jac: Keep the ``.jac`` fields.
        optimize_gramian_computation: Refuse an aggregator that would need the (T, P) matrix. Others never build it.

    Returns:
        The (T,) weights, None from an aggregator that has none.

    Raises:
        UsageError: No tensors, a repeated one, one without ``.jac``, different T, or an aggregator that needs the
            matrix although ``optimize_gramian_computation`` is on.

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
    jacobians = _known_jacobians(wanted)
    if optimize_gramian_computation and not aggregator.works_on_gram():
        raise UsageError(
            "optimize_gramian_computation needs an aggregator with weights from the Gram matrix and without "
            f"forward hooks or a forward of its own, got {aggregator}."
        )
    if not retain_jac:
        for tensor in wanted:
            del tensor.jac  # type: ignore[attr-defined]
    return aggregator.write(jacobians, wanted)


def _known_jacobians(tensors: list[Tensor]) -> list[Tensor]:
    if not tensors:
        raise UsageError("tensors must hold at least one tensor, got none.")
    if len(unique(tensors)) < len(tensors):
        raise UsageError("tensors must hold each tensor once, got one of them repeatedly.")
    if any(getattr(tensor, "jac", None) is None for tensor in tensors):
        raise UsageError("tensors must all have a .jac field: call backward or mtl_backward of fastmtl.autojac first.")
    jacobians: list[Tensor] = [tensor.jac for tensor in tensors]  # type: ignore[attr-defined]
    check_rows(jacobians, "tensors.jac")
    check_writable(tensors, ".grad")
    return jacobians
