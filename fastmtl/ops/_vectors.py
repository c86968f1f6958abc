"""Checks of vectors with one number per task."""

from __future__ import annotations

from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["check_vectors"]


def check_vectors(like: Tensor, **vectors: Tensor) -> None:
    """Refuse what does not hold as many floats as ``like``, on its device."""
    for name, vector in vectors.items():
        if vector.shape != like.shape or vector.dim() != 1 or not vector.is_floating_point():
            raise UsageError(
                f"{name} must hold {like.numel()} floats, one per task, got shape {tuple(vector.shape)} and dtype "
                f"{vector.dtype}."
            )
        if vector.device != like.device:
            raise UsageError(f"{name} must be on {like.device} as the others, got {vector.device}.")
