"""Forward passes that leave no trace in a network's buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

__all__ = ["keeping_buffers"]


class HasModules(Protocol):
    """A network, by its modules."""

    def modules(self) -> Iterator[nn.Module]:
        """Return all modules."""


@contextmanager
def keeping_buffers(model: HasModules) -> Iterator[None]:
    """Let the buffers of a network, such as statistics of batch norms, be at the end what they were."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                buffer.copy_(value)
                # A module may have put another tensor in its place.
                module._buffers[name] = buffer
