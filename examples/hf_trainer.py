"""Hugging Face's Trainer: the balanced loss from ``compute_loss``."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import TensorDataset
from two_tasks import TwoTasks, data

import fastmtl


class Trainer(transformers.Trainer):
    """A trainer whose losses are balanced by UPGrad."""

    def compute_loss(self, model: Any, inputs: list[Tensor], return_outputs: bool = False, **rest: Any) -> Any:
        """Return the balanced loss."""
        loss = fastmtl.balanced(model(*inputs), weighting="upgrad")
        return (loss, {}) if return_outputs else loss


class Collated(TensorDataset):
    """Batches as lists of tensors."""

    @staticmethod
    def collate(samples: list[tuple[Tensor, ...]]) -> list[Tensor]:
        """Return the samples stacked."""
        return [torch.stack(column) for column in zip(*samples, strict=True)]


def train(epochs: int = 10) -> tuple[TwoTasks, list[dict[str, Any]]]:
    """Return the model and the trainer's log."""
    transformers.set_seed(0)
    model = TwoTasks()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            learning_rate=1e-2,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=Collated(*data().tensors), data_collator=Collated.collate
        )
        trainer.train()
    return model, trainer.state.log_history


if __name__ == "__main__":
    print(train()[1])
