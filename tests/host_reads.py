"""Guards against waiting for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NoHostRead", "no_waits"]


class NoHostRead(TorchDispatchMode):
    """Raises where a value would be read on the host, or a tensor made of numbers there: on a GPU both wait for it."""

    READS = ("_local_scalar_dense", "nonzero", "aten.item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in self.READS):
            raise AssertionError("a value was read on the host")
        if "lift_fresh" in str(func):
            raise AssertionError("a tensor was made of numbers on the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise where the host waits for a GPU, as far as torch sees it."""
    try:
        _set_mode("error")
        yield
    finally:
        _set_mode("default")


def _set_mode(mode: str) -> None:
    # Torch warns, once, that it does not see everything.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
