"""A guard against waiting for the device."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoHostRead"]


class NoHostRead(TorchDispatchMode):
    """Raises where a value, or the number of nonzero ones, would be read on the host."""

    READS = ("_local_scalar_dense", "nonzero", "aten.item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in self.READS):
            raise AssertionError("a value was read on the host")
        return func(*args, **(kwargs or {}))
