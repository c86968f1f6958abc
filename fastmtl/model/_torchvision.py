"""Import torchvision, or raise an error with the install command."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

from fastmtl.errors import BackendError

__all__ = ["import_torchvision"]


def import_torchvision() -> ModuleType:
    """Return the torchvision module, also where its operators cannot be loaded (`fastmtl.support.vision`).

    Raises:
        BackendError: torchvision is not installed.
    """
    if find_spec("torchvision") is None:
        raise BackendError("This encoder needs torchvision, which is not installed: pip install torchvision.")
    return importlib.import_module("torchvision")
