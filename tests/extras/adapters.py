"""Trains the adapters of examples/lora.py in the named ways, in as many processes as torchrun has started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fastmtl.model._torchvision import import_torchvision

import_torchvision()
sys.path.append(str(Path(__file__).parents[2] / "examples"))
lora: Any = import_module("lora")


def in_accelerate(model: Any, shard: bool) -> None:
    """With FSDP2 by its plugin, which Accelerate reads on accelerators only: here it is told that it may."""
    accelerate: Any = import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    if shard:
        accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        assert accelerator.is_fsdp2
    lora.in_accelerate(model, accelerator)


WAYS: dict[str, Callable[[Any], Any]] = {
    "loop": lora.in_a_loop,
    "transformers": lora.in_transformers,
    "lightning": lora.in_lightning,
    "lightning-fsdp": lambda model: lora.in_lightning(model, shard=True),
    "accelerate": lambda model: in_accelerate(model, shard=False),
    "accelerate-fsdp": lambda model: in_accelerate(model, shard=True),
}


def trained(way: str) -> list[torch.Tensor]:
    """Return the adapters after an epoch."""
    model = lora.made()
    WAYS[way](model)
    adapters = model.adapters()
    assert all(isinstance(param, DTensor) == way.endswith("fsdp") for param in adapters)
    return [(param.full_tensor() if isinstance(param, DTensor) else param).detach().clone() for param in adapters]


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    found = {way: trained(way) for way in sys.argv[2:]}
    torch.save(found, f"{sys.argv[1]}/{lora.RANK}.pt")
    sys.stdout.flush()
    # See fastmtl/__main__.py.
    os._exit(0)
