"""Packages that only some of fastmtl needs, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from fastmtl.errors import UsageError

__all__ = ["need"]


def need(module: str, extra: str, what: str) -> Any:
    """Import a module of an optional dependency.

    Args:
        module: Its name, as ``"scipy.stats"``.
        extra: The extra of ``fastmtl-torch`` that installs it.
        what: What needs it, as the beginning of a sentence.

    Raises:
        UsageError: It is not installed; the sentence says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        package = module.partition(".")[0]
        raise UsageError(
            f"{what} needs the package {package}: pip install 'fastmtl-torch[{extra}]', or pip install {package}."
        ) from cause
