"""Hyper-parameters and options declared once, beside what they belong to.

A strategy or architecture lists its hyper-parameters as ``hyper = {"mgda_gn": Hyper(...)}``; the command line, the
configuration file, ``fastmtl.config`` and the trainer all read that table. The options of a run are fields of
dataclasses, made by :func:`option`; :func:`declared` gives them in the same form.
"""

from __future__ import annotations

import functools
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal

from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings, State
from fastmtl.support.names import resolve_name

__all__ = ["LIMITS", "Hyper", "Option", "check", "check_value", "declared", "fill_hyper", "option"]

_KINDS: dict[type, type] = {int: Integral, float: Real, dict: Mapping}
_CALLED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "`key: value` pairs"}
LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "least": ("at least", operator.ge),
    "most": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyper:
    """One hyper-parameter or option: its type, its default and what it means.

    Attributes:
        type: ``int``, ``float``, ``str`` or ``bool``; ``dict`` for options.
        default: The default value.
        help: What it does, in a sentence or a few.
        choices: The allowed values, None for any.
        many: Whether the value is a list.
        least: Inclusive lower bound.
        most: Inclusive upper bound.
        above: Exclusive lower bound.
        below: Exclusive upper bound.
        optional: Whether it may be None.
        words: Words that are allowed besides values of the type.
        accepts: Further types that are allowed.
        finite: Whether infinity is refused.
    """

    type: type[Any]
    default: Any
    help: str
    choices: tuple[Any, ...] | None = None
    many: bool = False
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    optional: bool = False
    words: tuple[str, ...] = ()
    accepts: tuple[Any, ...] = ()
    finite: bool = False

    def spelled(self, value: Any) -> Any:
        """Return the choice with this name in any case; other values unchanged."""
        if self.choices is None or not isinstance(value, str):
            return value
        return next((choice for choice in self.choices if str(choice).lower() == value.lower()), value)

    def problem(self, value: Any) -> str | None:
        """Return what a value must be, as in "at least 1"; None if it is valid."""
        if (value is None and self.optional) or (isinstance(value, str) and value in self.words):
            return None
        if self.choices is not None:
            return None if value in self.choices else f"one of {', '.join(map(str, self.choices))}"
        if self.many or isinstance(value, self.accepts):
            return None
        if not isinstance(value, _KINDS.get(self.type, self.type)) or (
            isinstance(value, bool) and self.type is not bool
        ):
            return self.wanted()
        if self.type not in (int, float):
            return None
        if value != value:
            return "a number"
        if self.finite and value in (float("inf"), float("-inf")):
            return "a finite number"
        for name, (words, holds) in LIMITS.items():
            limit = getattr(self, name)
            if limit is not None and not holds(value, limit):
                return f"{words} {limit}"
        return None

    def wanted(self) -> str:
        """Return which values are of the type, in words."""
        kind = _CALLED[self.type]
        return kind if not self.words else f"{kind.replace(' or', ',')} or {' or '.join(self.words)}"

    def allowed(self) -> str:
        """Return which values are allowed, in words."""
        if self.choices is not None:
            return ", ".join(map(str, self.choices))
        limits = [(words, getattr(self, name)) for name, (words, _) in LIMITS.items()]
        return ", ".join([self.wanted(), *(f"{words} {limit}" for words, limit in limits if limit is not None)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Option(Hyper):
    """An option of a run.

    Attributes:
        panel: The group of options it is shown in.
        resumable: Whether it may change when a run goes on: it does not decide what has been learned so far.
        same_as: The option that this is another name of.
        flag: Whether the command line has it.
        otherwise: The value where neither the option nor another name of it is given, which is None then.
    """

    panel: str = ""
    resumable: bool = False
    same_as: str | None = None
    flag: bool = True
    otherwise: Any = None


def option(default: Any, help: str, *, choices: Iterable[str] | None = None, **about: Any) -> Any:
    """Return a dataclass field for an option; further arguments are attributes of `Option`."""
    metadata = {"help": help, "finite": True, "choices": None if choices is None else tuple(choices), **about}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def declared(owner: Any) -> dict[str, Option]:
    """Return the options among the fields of a dataclass, by name; their types are those of the annotations."""
    return dict(_declared(owner))


@functools.cache
def _declared(owner: Any) -> dict[str, Option]:
    annotations = typing.get_type_hints(owner)
    return {
        entry.name: Option(
            default={} if entry.default is MISSING else entry.default,
            **_kinds(annotations[entry.name]),
            **entry.metadata,
        )
        for entry in fields(owner)
        if "help" in entry.metadata
    }


def _kinds(annotation: Any) -> dict[str, Any]:
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    members = typing.get_args(annotation) if union else (annotation,)
    words = [word for member in members if typing.get_origin(member) is Literal for word in typing.get_args(member)]
    origins = (typing.get_origin(member) or member for member in members if member is not type(None))
    first, *rest = (kind for kind in origins if kind is not Literal)
    return {"type": first, "optional": type(None) in members, "words": tuple(words), "accepts": tuple(rest)}


def check_value(name: str, value: object, spec: Hyper) -> None:
    """Refuse a value that a hyper-parameter or an option cannot have."""
    wanted = spec.problem(value)
    if wanted is not None:
        raise UsageError(f"{name} must be {wanted}, got {value!r}.")


def check(options: Any) -> None:
    """Check the options of a dataclass: types, limits and choices, which are put into their own spelling.

    Raises:
        UsageError: A value is not what the option may be, or an option and its other name differ.
    """
    specs = declared(type(options))
    for name, spec in specs.items():
        value = getattr(options, name)
        if value is None and (spec.optional or spec.otherwise is not None):
            continue
        if spec.choices is not None:
            value = resolve_name(value, {choice: choice for choice in spec.choices}, name)
        check_value(name, value, spec)
        object.__setattr__(options, name, value)
    for name, spec in specs.items():
        value = getattr(options, name)
        if spec.same_as is not None and value is not None:
            first = getattr(options, spec.same_as)
            if first not in (value, None):
                raise UsageError(f"{spec.same_as} is {first}, but {name}, another name for it, is {value}: give one.")
            object.__setattr__(options, spec.same_as, value)
            object.__setattr__(options, name, None)
    for name, spec in specs.items():
        if getattr(options, name) is None and spec.otherwise is not None:
            object.__setattr__(options, name, spec.otherwise)


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
        check_value(f"{name} of {owner}", value, declared[name])
        filled[name] = value
    return filled
