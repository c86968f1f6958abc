"""Trains the examples' network with Lightning or Accelerate, in as many processes as torchrun has started."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import fastmtl
from fastmtl.model._torchvision import import_torchvision

import_torchvision()
sys.path.append(str(Path(__file__).parents[2] / "examples"))

SIZE = int(os.environ.get("WORLD_SIZE", "1"))
STEPS = 6


def with_lightning() -> nn.Module:
    """Clipping, accumulation and logging are Lightning's."""
    lightning, examples = import_module("lightning"), import_module("lightning_module")
    torch.manual_seed(0)
    module = examples.Module(weighting="upgrad")
    trainer = lightning.Trainer(
        max_epochs=1,
        limit_train_batches=STEPS,
        accelerator="cpu",
        devices=SIZE,
        strategy="ddp" if SIZE > 1 else "auto",
        use_distributed_sampler=False,
        precision="64-true",
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's own sampler would shuffle.
    data = examples.data()
    rows: Any = DistributedSampler(data, SIZE, int(os.environ.get("RANK", "0")), shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=64 // SIZE, sampler=rows))
    assert trainer.callback_metrics["loss_class"] > 0
    return module.net


def with_accelerate() -> nn.Module:
    """Accelerate wraps the model, deals out the loader and accumulates."""
    accelerate, examples = import_module("accelerate"), import_module("two_tasks")
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = examples.TwoTasks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(examples.data(), batch_size=64 // SIZE)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, batch in enumerate(loader):
        if step == STEPS:
            break
        with accelerator.accumulate(wrapped):
            losses = wrapped(*batch)
            accelerator.backward(fastmtl.balanced(losses, weighting="upgrad"))
            accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    trained = {"lightning": with_lightning, "accelerate": with_accelerate}[sys.argv[1]]()
    torch.save(trained.state_dict(), f"{sys.argv[2]}/{os.environ.get('RANK', '0')}.pt")
    sys.stdout.flush()
    # See fastmtl/__main__.py.
    os._exit(0)
