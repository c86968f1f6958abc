"""A checkout of LibMTL to compare with, where one is named."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

__all__ = ["checkout", "load_file"]


def checkout() -> Path:
    """Return the folder of the checkout, or skip the test."""
    named = os.environ.get("FASTMTL_LIBMTL")
    if not named:
        pytest.skip("FASTMTL_LIBMTL names no checkout of LibMTL")
    folder = Path(named)
    assert (folder / "LibMTL").is_dir(), f"FASTMTL_LIBMTL={named} holds no LibMTL"
    return folder


def load_file(path: str) -> ModuleType:
    """Import one file of the checkout that needs nothing but torch, under a name of its own."""
    file = checkout() / path
    spec = importlib.util.spec_from_file_location(f"libmtl_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
