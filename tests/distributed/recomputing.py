"""A network whose blocks are computed anew in each backward pass, or keep their activations elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.utils.checkpoint import checkpoint

__all__ = ["Block", "Deep", "elsewhere", "prepare"]


class _Dropout(nn.Module):
    """Drops whole channels, the same in all rows: with one seed parts of a batch have the masks of the whole batch."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (torch.rand(hidden.shape[-1]) > 0.3).to(hidden) if self.training else hidden


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int, dropout: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner: nn.Module = nn.Sequential(
            nn.Linear(width, 2 * width), nn.Tanh(), dropout(), nn.Linear(2 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = hidden + self.inner(hidden)
        return found


def elsewhere() -> AbstractContextManager[None]:
    """Keep what backward passes need as copies outside of torch, as offloading from a GPU does."""

    def pack(tensor: Tensor) -> Any:
        # NumPy's view of a tensor would keep FSDP from freeing its memory.
        return tensor.detach().clone().numpy().copy()

    return saved_tensors_hooks(pack, torch.from_numpy)


def prepare(network: nn.Module, way: str) -> None:
    """Wrap the blocks as a way asks for."""
    if way in ("wrapped", "both"):
        apply_activation_checkpointing(network, check_fn=lambda module: isinstance(module, Block))
    if way == "within":
        for block in (module for module in network.modules() if isinstance(module, Block)):
            block.inner = checkpoint_wrapper(block.inner)
    if way == "offloaded":
        apply_activation_checkpointing(
            network, checkpoint_wrapper_fn=offload_wrapper, check_fn=lambda module: isinstance(module, Block)
        )
    if way == "both":
        network.blocks = offload_wrapper(network.blocks)


class Deep(nn.Module):
    """Three blocks after a layer.

    Args:
        way: What is done about the blocks' activations: ``plain`` (nothing), ``checkpoint`` in ``forward``, of each
            block, ``whole`` of all at once, ``cpu`` or ``elsewhere`` by hooks in ``forward``, or see :func:`prepare`.
        width: The number of features.
        depth: The number of blocks.
        dropout: Makes a dropout for each block.
    """

    def __init__(
        self, way: str, width: int = 8, depth: int = 3, dropout: Callable[[], nn.Module] = _Dropout, inputs: int = 6
    ) -> None:
        super().__init__()
        self.way = way
        self.first = nn.Linear(inputs, width)
        self.blocks: nn.Module = nn.Sequential(*(Block(width, dropout) for _ in range(depth)))
        prepare(self, way)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.first(inputs)
        if self.way == "whole":
            return checkpoint(self.blocks, hidden, use_reentrant=False)
        if self.way == "checkpoint":
            assert isinstance(self.blocks, nn.Sequential)
            for block in self.blocks:
                hidden = checkpoint(block, hidden, use_reentrant=False)
            return hidden
        hooks = {"cpu": save_on_cpu, "elsewhere": elsewhere}.get(self.way, nullcontext)
        with hooks():
            found: Tensor = self.blocks(hidden)
        return found
