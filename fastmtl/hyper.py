"""Hyper-parameters declared once, beside the class they belong to.

A strategy or architecture lists its hyper-parameters as ``hyper = {"mgda_gn": Hyper(...)}``; the command line, the
configuration file, ``fastmtl.config`` and the trainer all read that table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastmtl.errors import UsageError
from fastmtl.names import resolve_name

__all__ = ["Hyper", "fill_hyper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyper:
    """One hyper-parameter: its type, its default and what it means.

    Attributes:
        type: ``int``, ``float``, ``str`` or ``bool``.
        default: Value used when none is given.
        help: One line for ``--help``.
        choices: The allowed values, if they are few.
        many: Whether it takes a list of values.
    """

    type: type
    default: Any
    help: str
    choices: tuple[Any, ...] | None = None
    many: bool = False


def fill_hyper(owner: str, declared: Mapping[str, Hyper], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all hyper-parameters of ``owner``: the given ones checked, the others at their defaults.

    Raises:
        UsageError: An unknown name, or a value outside ``choices``.
    """
    filled = {name: spec.default for name, spec in declared.items()}
    for given_name, value in given.items():
        if not declared:
            raise UsageError(f"{owner} has no hyper-parameters, got {given_name!r}.")
        name = resolve_name(given_name, {each: each for each in declared}, f"hyper-parameter of {owner}")
        choices = declared[name].choices
        if choices is not None and value not in choices:
            raise UsageError(f"{name} of {owner} must be one of {', '.join(map(str, choices))}, got {value!r}.")
        filled[name] = value
    return filled
