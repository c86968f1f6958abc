"""Preference vectors: how much each task counts in what an aggregator makes of them."""

from __future__ import annotations

from torch import Tensor

from fastmtl.aggregation.base import MatrixWeighting
from fastmtl.aggregation.constant import ConstantWeighting
from fastmtl.errors import UsageError
from fastmtl.support.settings import Attribute, vector_string

__all__ = ["Preference", "preference_suffix"]


class Preference(Attribute[Tensor | None]):
    """The attribute ``pref_vector``: a (T,) tensor or None for equal preference.

    Setting it also sets ``weighting`` of its owner, whose forward hooks see the preferences that are used.

    Args:
        default: Makes the weighting that stands for None.
    """

    def __init__(self, default: type[MatrixWeighting]) -> None:
        self.default = default

    def __set__(self, instance: object, value: Tensor | None) -> None:
        if value is not None and value.dim() != 1:
            raise UsageError(f"pref_vector must have the shape (T,), got {tuple(value.shape)}.")
        setattr(instance, "weighting", self.default() if value is None else ConstantWeighting(value))  # noqa: B010
        super().__set__(instance, value)


def preference_suffix(preference: Tensor | None) -> str:
    """Return what a preference adds to the name of an aggregator."""
    return "" if preference is None else f"([{vector_string(preference)}])"
