"""The fields of tensors that receive Jacobians and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["add_jacobians", "check_writable"]


def check_writable(tensors: Iterable[Tensor], field: str) -> None:
    """Raise a UsageError for tensors that autograd would give no gradient."""
    for tensor in tensors:
        if not tensor.requires_grad or not (tensor.is_leaf or tensor.retains_grad):
            raise UsageError(
                f"{field} needs leaves that require grad, or tensors that retain their grad, "
                f"got a tensor of shape {tuple(tensor.shape)} that is neither."
            )


def add_jacobians(tensors: Sequence[Tensor], jacobians: Sequence[Tensor]) -> None:
    """Add Jacobians (m, ...) to ``.jac``; a UsageError if it has another number of rows."""
    for tensor, jacobian in zip(tensors, jacobians, strict=True):
        known = getattr(tensor, "jac", None)
        if known is None:
            tensor.jac = jacobian  # type: ignore[attr-defined]
        elif known.shape != jacobian.shape:
            raise UsageError(
                f".jac must have {len(jacobian)} rows for the new ones to be added, got {len(known)}; "
                "call jac_to_grad first, or delete .jac."
            )
        else:
            known += jacobian
