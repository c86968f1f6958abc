"""How many kernels a piece of work launches on a GPU, counted on any device."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LaunchCounter"]

# Operators without work on the device that their schemas do not show to be views.
_FREE = {
    *(
        "_unsafe_view",
        "_reshape_alias",
        "detach_",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "requires_grad_",
    ),
    *("new_empty_strided", "set_", "unsafe_split", "unsafe_chunk", "_local_scalar_dense"),
}


class LaunchCounter(TorchDispatchMode):
    """Counts operators that do work on the device: one launch each, a fused operator over many tensors too.

    Attributes:
        counts: Launches by name of the operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All launches."""
        return self.counts.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator and run it."""
        name = func._schema.name.removeprefix("aten::")
        is_view = any(
            result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
        )
        if not is_view and name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
