"""Names in any case, and the nearest valid one when a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from fastmtl.errors import UsageError

__all__ = ["did_you_mean", "known_name", "resolve_name"]

# Names that are suggested at most.
_MOST = 5

T = TypeVar("T")


def _key(name: str) -> str:
    return name.lower().replace("-", "_")


def known_name(name: str, choices: Iterable[str]) -> str | None:
    """Return the one of the choices that a name is, ignoring case and treating ``-`` as ``_``; None if it is none."""
    return {_key(choice): choice for choice in choices}.get(_key(name)) if isinstance(name, str) else None


def resolve_name(name: str, choices: Mapping[str, T], what: str) -> T:
    """Return ``choices[name]``, ignoring case and treating ``-`` as ``_``; ``what``, as ``"weighting"``, is for errors.

    Raises:
        UsageError: Not a string, or an unknown name; the message has the nearest valid name and all of them.
    """
    if not isinstance(name, str):
        raise UsageError(f"{what} must be one of {', '.join(choices)}, got {name!r}.")
    by_key = {_key(choice): value for choice, value in choices.items()}
    if _key(name) in by_key:
        return by_key[_key(name)]
    # A prefix is nearer than any other name, however much is missing.
    with_prefix = [key for key in by_key if len(_key(name).strip("_")) > 1 and key.startswith(_key(name))]
    near = with_prefix or difflib.get_close_matches(_key(name), list(by_key), n=1, cutoff=0.5)
    spelled = {_key(choice): choice for choice in choices}
    hint = f" Did you mean {spelled[near[0]]!r}?" if near else ""
    raise UsageError(f"Unknown {what} {name!r}.{hint} Known: {', '.join(choices)}.")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'a', 'b' or 'c'?``: the shortest names that begin so, else the nearest one."""
    known = list(choices)
    longer = sorted((choice for choice in known if name and choice.startswith(name)), key=lambda it: (len(it), it))
    near = longer[:_MOST] or difflib.get_close_matches(name, known, n=1)
    if not near:
        return ""
    *first, last = map(repr, near)
    return f" Did you mean {', '.join(first)}{' or ' if first else ''}{last}?"
