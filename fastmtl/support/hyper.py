"""Hyper-parameters, declared in the class they belong to.

A strategy or architecture lists its hyper-parameters as ``hyper = {"mgda_gn": Hyper(...)}``; the command line, the
configuration file, ``fastmtl.config`` and the trainer all read that table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings, State
from fastmtl.support.names import resolve_name

__all__ = ["Hyper", "fill_hyper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyper:
    """One hyper-parameter: its type, its default and what it means.

    Attributes:
        type: ``int``, ``float``, ``str`` or ``bool``.
        default: The default value.
        help: One line for ``--help``.
        choices: The allowed values, None for any.
        many: Whether the value is a list.
        least: Inclusive lower bound.
        above: Exclusive lower bound.
    """

    type: type
    default: Any
    help: str
    choices: tuple[Any, ...] | None = None
    many: bool = False
    least: float | None = None
    above: float | None = None

    def spelled(self, value: Any) -> Any:
        """Return the choice with this name in any case; other values unchanged."""
        if self.choices is None or not isinstance(value, str):
            return value
        return next((choice for choice in self.choices if str(choice).lower() == value.lower()), value)

    def problem(self, value: Any) -> str | None:
        """Return what a value must be, as in "at least 1"; None if it is valid."""
        if self.choices is not None:
            return None if value in self.choices else f"one of {', '.join(map(str, self.choices))}"
        if self.many:
            return None
        kinds: dict[type, type] = {int: Integral, float: Real}
        if not isinstance(value, kinds.get(self.type, self.type)) or (
            isinstance(value, bool) and self.type is not bool
        ):
            return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[self.type]
        number: Any = value
        if number != number:
            return "a number"
        if self.least is not None and not number >= self.least:
            return f"at least {self.least}"
        if self.above is not None and not number > self.above:
            return f"above {self.above}"
        return None


def fill_hyper(owner: str, declared: Mapping[str, Hyper], settings: Settings) -> State:
    """Return all hyper-parameters of ``owner``: the given ones checked, the others at their defaults.

    Raises:
        UsageError: An unknown name, or a value of another type or range.
    """
    filled = {name: spec.default for name, spec in declared.items()}
    for key, value in settings.items():
        if not declared:
            raise UsageError(f"{owner} has no hyper-parameters, got {key!r}.")
        name = resolve_name(key, {name: name for name in declared}, f"hyper-parameter of {owner}")
        value = declared[name].spelled(value)
        wanted = declared[name].problem(value)
        if wanted is not None:
            raise UsageError(f"{name} of {owner} must be {wanted}, got {value!r}.")
        filled[name] = value
    return filled
