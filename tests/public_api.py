"""The public interface as text; ``python -m tests.public_api`` writes it to public_api.txt, which a test compares."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["FILE", "MODULES", "lines"]

FILE = Path(__file__).with_suffix(".txt")
# What a user may import names from; `__all__` of each lists them.
MODULES = (
    *("fastmtl", "fastmtl.aggregation", "fastmtl.architecture", "fastmtl.autogram", "fastmtl.autojac"),
    *("fastmtl.config", "fastmtl.data", "fastmtl.distributed", "fastmtl.errors"),
    *("fastmtl.experiments", "fastmtl.linalg", "fastmtl.loss", "fastmtl.metrics", "fastmtl.model", "fastmtl.ops"),
    *("fastmtl.scalarization", "fastmtl.utils", "fastmtl.weighting"),
)


def lines() -> list[str]:
    """Return a line for each public name, and for each public method and property of a class."""
    found: list[str] = []
    for module in MODULES:
        package = importlib.import_module(module)
        for name in sorted(package.__all__):
            found += described(f"{module}.{name}", getattr(package, name))
    return found


def described(path: str, what: Any) -> Iterator[str]:
    """Yield what users see of one name."""
    if inspect.isclass(what):
        yield f"{path}({arguments(what)})"
        for name in sorted(own_members(what)):
            member = inspect.getattr_static(what, name)
            if isinstance(member, property):
                yield f"{path}.{name}"
            elif inspect.isroutine(getattr(what, name)):
                yield f"{path}.{name}({arguments(getattr(what, name))})"
    elif callable(what):
        yield f"{path}({arguments(what)})"
    else:
        yield f"{path}: {type(what).__name__}"


def own_members(what: type) -> set[str]:
    """Return the public attributes that a class has from this package, without those of other public classes."""
    names: set[str] = set()
    for base in what.__mro__:
        if base.__module__.startswith("fastmtl.") and (base is what or base not in public_classes()):
            names |= {name for name in vars(base) if not name.startswith("_")}
    return names


@functools.cache
def public_classes() -> frozenset[type]:
    """Return all classes that a user may import."""
    packages = map(importlib.import_module, MODULES)
    values = (getattr(package, name) for package in packages for name in package.__all__)
    return frozenset(value for value in values if inspect.isclass(value))


def arguments(what: Any) -> str:
    """Return the arguments of a call with their defaults, without annotations."""
    try:
        signature = inspect.signature(what)
    except (TypeError, ValueError):
        return "..."
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    text = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))[1:-1]
    return re.sub(r" at 0x[0-9a-f]+", "", text)


if __name__ == "__main__":
    FILE.write_text("\n".join(lines()) + "\n")
