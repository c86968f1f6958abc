"""fastmtl: a fast trainer for multi-task learning on PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmtl.support.stateful import Stateful
from fastmtl.support.vision import repair_at_import

__version__ = "0.1.0"
__all__ = ["Layerwise", "Sketch", "Stateful", "Trainer", "__version__", "balance", "balanced", "compare", "load"]

if TYPE_CHECKING:
    from fastmtl.balancing import balance, balanced
    from fastmtl.deploy.model import load
    from fastmtl.experiments import compare
    from fastmtl.layerwise import Layerwise, Sketch
    from fastmtl.trainer import Trainer

# What pulls in torch or the whole training stack is imported on first use, to keep `import fastmtl` cheap.
_LATE = {
    "Layerwise": "fastmtl.layerwise",
    "Sketch": "fastmtl.layerwise",
    "Trainer": "fastmtl.trainer",
    "balance": "fastmtl.balancing",
    "balanced": "fastmtl.balancing",
    "compare": "fastmtl.experiments",
    "load": "fastmtl.deploy.model",
}
# LibMTL's modules, which `import LibMTL` brings with it.
_MODULES = frozenset({"architecture", "config", "loss", "metrics", "model", "utils", "weighting"})

repair_at_import()


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastmtl.{name}")
    raise AttributeError(f"module 'fastmtl' has no attribute {name!r}")
