"""Low-rank adapters of a small decoder, balanced between two aims: to learn a text, and to stay near the model it was.

The same steps in a plain loop, in Hugging Face's Trainer, in Lightning and in Accelerate. With several processes:
``torchrun --nproc-per-node 2 examples/lora.py loop``, ``lightning``, ``fsdp`` (Lightning with FSDP2) or ``accelerate``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import accelerate
import lightning
import peft
import torch
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import fastmtl
from fastmtl.distributed import together

BATCH, RATE = 8, 2.0
SIZE, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))


class Sums(Dataset[dict[str, Tensor]]):
    """Lines such as ``3+8=11;``, five in a row; a token is a character."""

    def __init__(self, rows: int = 128) -> None:
        numbers = torch.randint(10, (rows, 5, 2), generator=torch.Generator().manual_seed(1)).tolist()
        texts = ["".join(f"{a}+{b}={a + b:02d};" for a, b in row) for row in numbers]
        self.tokens = torch.tensor([[ord(letter) - ord(" ") for letter in text] for text in texts])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index]}


class Adapted(nn.Module):
    """A Llama of two layers whose adapters alone are trained; returns the losses of a batch of tokens."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
        adapters = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
        self.model = peft.get_peft_model(base, adapters)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the cross entropy of the next tokens and the divergence from the model without adapters."""
        with torch.no_grad(), self.model.disable_adapter():
            reference = self.model(tokens, use_cache=False).logits.log_softmax(-1)
        policy = self.model(tokens, use_cache=False).logits.log_softmax(-1)
        return {
            "next": functional.nll_loss(policy[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()),
            "near": functional.kl_div(reference, policy, reduction="none", log_target=True).sum(-1).mean(),
        }

    def adapters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return [param for param in self.parameters() if param.requires_grad]


def made() -> Adapted:
    """Return the same model in every process."""
    torch.manual_seed(0)
    return Adapted()


def batches() -> DataLoader[dict[str, Tensor]]:
    """Return this process's part of the batches, in order."""
    rows: Any = DistributedSampler(Sums(), SIZE, RANK, shuffle=False)
    return DataLoader(Sums(), BATCH // SIZE, sampler=rows)


def in_a_loop(model: Adapted, epochs: int = 1) -> list[dict[str, float]]:
    """Train in plain PyTorch, in any number of processes; return the losses of each step."""
    optimizer = torch.optim.SGD(model.adapters(), RATE)
    history = []
    for batch in [batch for _ in range(epochs) for batch in batches()]:
        losses = model(**batch)
        optimizer.zero_grad()
        fastmtl.balance(losses, weighting="upgrad")
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    return history


class Trainer(transformers.Trainer):
    """Hugging Face's trainer with the balanced loss."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **rest: Any) -> Any:
        """Return the balanced loss."""
        loss = fastmtl.balanced(model(**inputs), shared=model, weighting="upgrad")
        return (loss, {}) if return_outputs else loss

    def _get_train_sampler(self, *args: Any) -> None:
        """Keep the order of the rows."""


def in_transformers(model: Adapted) -> None:
    """Train in Hugging Face's Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH // SIZE,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        Trainer(model=model, args=arguments, train_dataset=Sums()).train()


class Module(lightning.LightningModule):
    """The model for Lightning; ``shard`` cuts its parameters among the processes (FSDP2)."""

    def __init__(self, net: Adapted, shard: bool = False) -> None:
        super().__init__()
        self.net, self.shard = net, shard

    def configure_model(self) -> None:
        """Shard the parameters; FSDP2 is the only strategy that has a mesh."""
        if self.shard:
            shard_layers(self.net)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Return the balanced loss."""
        return fastmtl.balanced(self.net(**batch), shared=self.net, weighting="upgrad")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.net.adapters(), RATE)


def shard_layers(model: Adapted) -> None:
    """Shard each layer by itself, and then the rest."""
    for layer in model.model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)


def in_lightning(model: Adapted, shard: bool = False) -> None:
    """Train in Lightning: alone, under DDP or under FSDP2."""
    strategy = ModelParallelStrategy(data_parallel_size=SIZE, tensor_parallel_size=1) if shard else "ddp"
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=SIZE,
        strategy=strategy if SIZE > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(model, shard and SIZE > 1), batches())


def in_accelerate(model: Adapted, accelerator: accelerate.Accelerator) -> None:
    """Train in a loop of Accelerate, in what way its launcher says: alone, under DDP or under FSDP2."""
    optimizer = torch.optim.SGD(model.adapters(), RATE)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for batch in batches():
        losses = wrapped(**batch)
        accelerator.backward(fastmtl.balanced(losses, shared=wrapped, weighting="upgrad"))
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    model, name = made(), sys.argv[1] if len(sys.argv) > 1 else "loop"
    if name == "loop":
        with together():
            history = in_a_loop(model, epochs=4)
        print("first", history[1], "last", history[-1])
    elif name == "transformers":
        in_transformers(model)
    elif name == "accelerate":
        in_accelerate(model, accelerate.Accelerator())
    else:
        in_lightning(model, shard=name == "fsdp")
