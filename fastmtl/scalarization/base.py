"""What every scalarizer is: a scalar from the losses."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.support.settings import Described

__all__ = ["Scalarizer", "check_same_shape"]


class Scalarizer(Described, nn.Module, ABC):
    """Turns a tensor of losses of any shape into a scalar."""

    @abstractmethod
    def forward(self, values: Tensor, /) -> Tensor:
        """Return the scalar."""

    def __str__(self) -> str:
        return type(self).__name__


def check_same_shape(name: str, tensor: Tensor | None, values: Tensor) -> None:
    """Raise a UsageError for a tensor that does not have the shape of the losses; None passes."""
    if tensor is not None and tensor.shape != values.shape:
        raise UsageError(f"values must have the shape {tuple(tensor.shape)} of {name}, got {tuple(values.shape)}.")
