"""Values of settings, as YAML and the command line give them, in the types the settings are declared with."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from typing import SupportsFloat, SupportsInt

from fastmtl.errors import UsageError
from fastmtl.support.hyper import Hyper

__all__ = ["WORDS", "coerce", "coerce_hyper"]

WORDS: dict[str, bool | str] = {
    "on": True,
    "true": True,
    "yes": True,
    "off": False,
    "false": False,
    "no": False,
    "auto": "auto",
}


def coerce(name: str, value: object, kind: object) -> object:
    """Return `value` in the type `kind`, the annotation of the setting `name`.

    Raises:
        UsageError: It cannot be had in that type.
    """
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    members = tuple(typing.get_origin(member) or member for member in members)
    if (value is None and type(None) in members) or (len(members) > 1 and type(value) in members):
        return value
    convert, wanted = _CONVERTERS[members[0]]
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be {wanted}, got {value!r}.") from None


def coerce_hyper(name: str, value: object, spec: Hyper) -> object:
    """Return `value` (from YAML or the command line, where a list may be ``"3,1"``) in the type `spec` asks for."""
    if not spec.many:
        return value if value is None else coerce(name, value, spec.type)
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    return [coerce(name, part, spec.type) for part in (parts if isinstance(parts, list | tuple) else [parts])]


def _to_bool(value: object) -> bool:
    word = WORDS.get(str(value).lower())
    if not isinstance(word, bool):
        raise ValueError
    return word


def _to_int(value: object) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    if not isinstance(value, str | SupportsInt):
        raise TypeError
    return int(value)


def _to_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, str | SupportsFloat):
        raise TypeError
    # YAML reads 1e-4, without a point, as text.
    return float(value)


def _to_str(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    return str(value)


def _to_dict(value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {str(key): each for key, each in value.items()}


_CONVERTERS: dict[type, tuple[Callable[[object], object], str]] = {
    bool: (_to_bool, "true or false"),
    int: (_to_int, "a whole number"),
    float: (_to_float, "a number"),
    str: (_to_str, "text"),
    dict: (_to_dict, "`key: value` pairs"),
}
