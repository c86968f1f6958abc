"""Settings of modules: checked whenever they are set, and seen through from an aggregator to its weighting."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Generic, Self, TypeVar, cast, overload

from torch import Tensor

from fastmtl.errors import UsageError

__all__ = [
    "Attribute",
    "Described",
    "Setting",
    "Through",
    "at_least",
    "optional_vector",
    "positive",
    "vector_string",
    "weighting_of",
]

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class Attribute(Generic[T]):
    """An attribute that a module keeps under its name with ``_`` in front."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Self | T:
        return self if instance is None else self.read(instance)

    def read(self, instance: object) -> T:
        """Return the value."""
        return cast(T, instance.__dict__[f"_{self.name}"])

    def __set__(self, instance: object, value: T) -> None:
        instance.__dict__[f"_{self.name}"] = value


class Setting(Attribute[T]):
    """An attribute whose values must be ``allowed``; ``what`` names them in the message."""

    def __init__(self, allowed: Callable[[T], bool], what: str) -> None:
        self.allowed = allowed
        self.what = what

    def __set__(self, instance: object, value: T) -> None:
        if not self.allowed(value):
            raise UsageError(f"{self.name} of {type(instance).__name__} must be {self.what}, got {value!r}.")
        super().__set__(instance, value)


def at_least(least: Number) -> Setting[Number]:
    """Return a setting of numbers that are not less."""
    return Setting(lambda value: value >= least, f"at least {least:g}")


def positive(kind: type[Number]) -> Setting[Number]:
    """Return a setting of numbers above 0."""
    return Setting(lambda value: value > 0, "positive")


def optional_vector() -> Setting[Tensor | None]:
    """Return a setting of one number for each task, or None."""
    return Setting(lambda value: value is None or value.dim() == 1, "None or of shape (T,)")


class Through(Attribute[T]):
    """An attribute of an aggregator that is its weighting's."""

    def read(self, instance: object) -> T:
        """Return the weighting's value."""
        return cast(T, getattr(weighting_of(instance), self.name))

    def __set__(self, instance: object, value: T) -> None:
        setattr(weighting_of(instance), self.name, value)


def weighting_of(aggregator: object) -> object:
    """Return the weighting with an aggregator's settings and state."""
    return getattr(aggregator, "gramian_weighting" if hasattr(aggregator, "gramian_weighting") else "weighting")


class Described:
    """A class whose ``repr`` gives its settings.

    Attributes:
        settings: Their names, in order; those of the attributes of this module's kinds unless a class says otherwise.
    """

    settings: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        declared = tuple(name for name, value in vars(cls).items() if isinstance(value, Attribute))
        if declared and "settings" not in vars(cls):
            cls.settings = declared

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.settings)})"


def vector_string(vector: Tensor) -> str:
    """Return the numbers with up to two decimals."""
    return ", ".join(f"{value:.2f}".rstrip("0") for value in vector.tolist())
