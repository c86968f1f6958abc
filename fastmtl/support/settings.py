"""Settings of modules: checked whenever they are set, and seen through from an aggregator to its weighting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast, overload

from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["Setting", "Through", "described", "vector_string"]

T = TypeVar("T")


class Setting(Generic[T]):
    """An attribute with a condition.

    Args:
        allowed: Says whether a value is valid.
        what: The valid values, for the message.
    """

    def __init__(self, allowed: Callable[[T], bool], what: str) -> None:
        self.allowed = allowed
        self.what = what

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Setting[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Setting[T] | T:
        if instance is None:
            return self
        return cast(T, instance.__dict__[f"_{self.name}"])

    def __set__(self, instance: object, value: T) -> None:
        if not self.allowed(value):
            raise UsageError(f"{self.name} of {type(instance).__name__} must be {self.what}, got {value!r}.")
        instance.__dict__[f"_{self.name}"] = value


class Through(Generic[T]):
    """An attribute of an aggregator that is its weighting's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Through[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Through[T] | T:
        if instance is None:
            return self
        return cast(T, getattr(_weighting_of(instance), self.name))

    def __set__(self, instance: object, value: T) -> None:
        setattr(_weighting_of(instance), self.name, value)


def _weighting_of(aggregator: Any) -> Any:
    return getattr(aggregator, "gramian_weighting", None) or aggregator.weighting


def described(instance: object, names: tuple[str, ...]) -> str:
    """Return ``Class(name=value, ...)``."""
    return f"{type(instance).__name__}({', '.join(f'{name}={getattr(instance, name)!r}' for name in names)})"


def vector_string(vector: Tensor) -> str:
    """Return the numbers with up to two decimals."""
    return ", ".join(f"{value:.2f}".rstrip("0") for value in vector.tolist())
