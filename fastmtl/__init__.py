"""fastmtl: a fast trainer for multi-task learning on PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastmtl.stateful import Stateful

__version__ = "0.1.0"
__all__ = ["Stateful", "Trainer", "__version__"]

if TYPE_CHECKING:
    from fastmtl.trainer import Trainer


def __getattr__(name: str) -> Any:
    # Trainer pulls in the whole training stack; importing it on first use keeps `import fastmtl` cheap.
    if name == "Trainer":
        from fastmtl.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'fastmtl' has no attribute {name!r}")
