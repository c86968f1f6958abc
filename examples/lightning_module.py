"""PyTorch Lightning: return the balanced loss; logging, clipping, accumulation and precision stay Lightning's.

With several processes: ``torchrun --nproc-per-node 2 examples/lightning_module.py``.
"""

from __future__ import annotations

import os
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from two_tasks import TwoTasks, data

import fastmtl


class Module(lightning.LightningModule):
    """Two tasks balanced by MGDA."""

    def __init__(self, weighting: str = "mgda") -> None:
        super().__init__()
        self.net = TwoTasks()
        self.weighting = weighting

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the balanced loss."""
        losses = self.net(*batch)
        self.log_dict({f"loss_{task}": loss.detach() for task, loss in losses.items()}, prog_bar=True)
        return fastmtl.balanced(losses, shared=self.net.shared, weighting=self.weighting)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def train(epochs: int = 10, **options: Any) -> lightning.Trainer:
    """Return the trainer after training; ``options`` go to it."""
    lightning.seed_everything(0, verbose=False)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", devices=processes, logger=False, **options)
    trainer.fit(Module(), DataLoader(data(), batch_size=64, shuffle=True))
    return trainer


if __name__ == "__main__":
    print(train(gradient_clip_val=1.0, accumulate_grad_batches=2, enable_checkpointing=False).callback_metrics)
