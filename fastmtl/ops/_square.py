"""What the ops on a (T, T) Gram matrix share: checks of their arguments and the dtype of their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["check_gram", "check_vector", "weight_dtype"]


def check_gram(gram: Tensor) -> None:
    """Refuse what is no Gram matrix.

    Raises:
        UsageError: Not a square matrix of floats with at least one row.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0 or not gram.is_floating_point():
        raise UsageError(
            f"gram must be a (T, T) matrix of floats with T >= 1, got shape {tuple(gram.shape)} and dtype {gram.dtype}."
        )


def check_vector(name: str, vector: Tensor | None, gram: Tensor) -> None:
    """Refuse a vector that does not hold one number per row of ``gram``; None passes.

    Raises:
        UsageError: Wrong shape, dtype or device.
    """
    if vector is None:
        return
    if vector.shape != gram.shape[:1] or not vector.is_floating_point():
        raise UsageError(
            f"{name} must hold {gram.shape[0]} floats, one per row of gram, "
            f"got shape {tuple(vector.shape)} and dtype {vector.dtype}."
        )
    if vector.device != gram.device:
        raise UsageError(f"{name} must be on gram's device {gram.device}, got {vector.device}.")


def weight_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, the one device without it."""
    return torch.float32 if device.type == "mps" else torch.float64
