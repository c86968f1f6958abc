"""A guard against waiting for the device."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoHostRead"]


class NoHostRead(TorchDispatchMode):
    """Raises where a value would be read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func):
            raise AssertionError("a value was read on the host")
        return func(*args, **(kwargs or {}))
