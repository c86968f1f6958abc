"""Classes that others derive from."""

from __future__ import annotations

__all__ = ["overrides"]


def overrides(cls: type, method: str, flag: str) -> bool:
    """Return whether a class, or a mixin of it, overrides a method of the class that sets a flag of it."""
    method_at, flag_at = (
        next((k for k, base in enumerate(cls.__mro__) if name in vars(base)), len(cls.__mro__))
        for name in (method, flag)
    )
    return method_at < flag_at
