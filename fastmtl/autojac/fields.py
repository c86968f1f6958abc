"""The fields of a tensor that Jacobians and gradients are put into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["add_jacobians", "check_writable"]


def check_writable(tensors: Iterable[Tensor], field: str) -> None:
    """Refuse with a UsageError tensors that autograd would not give a gradient to."""
    for tensor in tensors:
        if not tensor.requires_grad or not (tensor.is_leaf or tensor.retains_grad):
            raise UsageError(
                f"{field} can be filled of a leaf that requires grad or a tensor that retains its grad, "
                f"got a tensor of shape {tuple(tensor.shape)} that is neither."
            )


def add_jacobians(tensors: Sequence[Tensor], jacobians: Sequence[Tensor]) -> None:
    """Put Jacobians (m, ...) into ``.jac``, added to what is there."""
    for tensor, jacobian in zip(tensors, jacobians, strict=True):
        known = getattr(tensor, "jac", None)
        if known is None:
            tensor.jac = jacobian  # type: ignore[attr-defined]
        elif known.shape != jacobian.shape:
            raise UsageError(
                f".jac must have {len(jacobian)} rows to be added to, got {len(known)}; "
                "use the Jacobians with jac_to_grad first, or delete them."
            )
        else:
            known += jacobian
