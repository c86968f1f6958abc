"""Accelerate: give the balanced loss to ``accelerator.backward``, in one process or, with ``torchrun``, in several."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from two_tasks import TwoTasks, data

import fastmtl


def train(epochs: int = 10) -> list[dict[str, float]]:
    """Return the losses of each step."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = TwoTasks()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=64, shuffle=True))
    history = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                losses = model(*batch)
                accelerator.backward(fastmtl.balanced(losses, weighting="upgrad"))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            history.append({task: loss.item() for task, loss in losses.items()})
    return history


if __name__ == "__main__":
    losses = train()
    print("first", losses[0], "last", losses[-1])
