"""The training loop and what belongs to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Trainer"]

if TYPE_CHECKING:
    from fastmtl.trainer.trainer import Trainer


def __getattr__(name: str) -> Any:
    # Loggers and configurations are used without the training stack, by the command line above all.
    if name == "Trainer":
        from fastmtl.trainer.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'fastmtl.trainer' has no attribute {name!r}")
