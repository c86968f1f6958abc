"""The environment variables that fastmtl reads at run time.

A switch is ``0`` or ``1``. An unset or empty variable means its default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fastmtl.errors import UsageError

__all__ = ["VARIABLES", "Variable", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """An environment variable; any text is allowed without ``options``; ``fastmtl doctor`` prints the ``meaning``."""

    default: str
    options: tuple[str, ...] = ()
    meaning: str


VARIABLES: Mapping[str, Variable] = {
    "FASTMTL_BACKEND": Variable(
        default="auto",
        options=("auto", "reference", "cpp", "triton", "cuda"),
        meaning="Backend of all ops; auto takes the fastest available one, any other raises an error if unavailable.",
    ),
    "FASTMTL_CACHE": Variable(
        default="~/.cache/fastmtl",
        meaning="Folder for data sets that fastmtl makes or downloads, such as rooms.",
    ),
    "FASTMTL_TRACEBACK": Variable(
        default="0",
        options=("0", "1"),
        meaning="The command prints the traceback of an error, as with --traceback.",
    ),
    "FASTMTL_ISA": Variable(
        default="auto",
        options=("auto", "avx512", "avx2", "portable"),
        meaning="Widest vector instructions the C++ kernels may use; auto takes the widest this processor has.",
    ),
}


def read(name: str) -> str:
    """Return the value of a variable of the table, in lower case if it has options.

    Raises:
        UsageError: The value is not among the options.
    """
    variable = VARIABLES[name]
    value = os.environ.get(name, "").strip() or variable.default
    if not variable.options:
        return value
    value = value.lower()
    if value not in variable.options:
        raise UsageError(f"{name} must be one of {', '.join(variable.options)}, got {value!r}.")
    return value
