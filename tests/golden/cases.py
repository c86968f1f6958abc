"""Replays recorded LibMTL training runs: same initial state, batches and hyper-parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastmtl import Trainer
from fastmtl import loss as losses
from fastmtl.metrics import AbsMetric

__all__ = ["Golden", "close"]


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class _NoMetric(AbsMetric):
    def update_fun(self, pred: Any, gt: Any) -> None:
        pass

    def score_fun(self) -> list[float]:
        return [1.0]


class _Rows(Dataset[Any]):
    def __init__(self, x: torch.Tensor, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        y = {task: value[index] for task, value in self.y.items()} if isinstance(self.y, dict) else self.y[index]
        return self.x[index], y


@dataclass
class Golden:
    """One recorded run."""

    name: str
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Golden:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        return cls(path.stem, arrays, json.loads(str(arrays.pop("meta"))))

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the state_dict recorded as ``before``, ``state.<step>`` or ``after``."""
        start = prefix + "."
        return {
            key[len(start) :]: torch.from_numpy(value) for key, value in self.arrays.items() if key.startswith(start)
        }

    @property
    def steps(self) -> int:
        return self.meta["epochs"] * len(self.batches)

    @property
    def batches(self) -> list[tuple[Any, Any]]:
        """The batches of an epoch, as the training step takes them."""
        tasks, size = self.meta["tasks"], self.meta["batch_size"]
        labels = {task: torch.from_numpy(self.arrays[f"y.{task}"]) for task in tasks}
        inputs: Any = None
        if self.meta["multi_input"]:
            inputs = {task: torch.from_numpy(self.arrays[f"x.{task}"]) for task in tasks}
        found = []
        for start in range(0, len(labels[tasks[0]]), size):
            part = slice(start, start + size)
            x = {t: v[part] for t, v in inputs.items()} if inputs else torch.from_numpy(self.arrays["x"])[part]
            found.append((x, {task: value[part] for task, value in labels.items()}))
        return found

    def loaders(self) -> Any:
        tasks, size = self.meta["tasks"], self.meta["batch_size"]
        labels = {task: torch.from_numpy(self.arrays[f"y.{task}"]) for task in tasks}
        if not self.meta["multi_input"]:
            return DataLoader(_Rows(torch.from_numpy(self.arrays["x"]), labels), batch_size=size)
        return {
            task: DataLoader(_Rows(torch.from_numpy(self.arrays[f"x.{task}"]), labels[task]), batch_size=size)
            for task in tasks
        }

    def trainer(self, **options: Any) -> Trainer:
        """Return a trainer in the recorded initial state."""
        meta = self.meta
        tasks = meta["tasks"]
        task_dict = {
            task: {"metrics": ["none"], "metrics_fn": _NoMetric(), "loss_fn": getattr(losses, name)(), "weight": [1]}
            for task, name in zip(tasks, meta["losses"], strict=True)
        }
        decoders = nn.ModuleDict({task: nn.Linear(5, out) for task, out in zip(tasks, meta["outputs"], strict=True)})
        trainer = Trainer(
            task_dict,
            meta["weighting"],
            "HPS",
            _Encoder,
            decoders,
            meta["rep_grad"],
            meta["multi_input"],
            meta["optim"],
            None,
            device="cpu",
            weight_args=meta["weight_args"],
            **options,
        )
        state = trainer.model.state_dict()
        trainer.model.load_state_dict(state | self.state("before"))
        return trainer


def close(got: torch.Tensor, want: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a tensor agrees with the recorded one, relative to its size and to how far training moved it."""
    error = torch.linalg.vector_norm(got - want)
    moved = torch.linalg.vector_norm(want - before)
    return bool(error <= 2e-4 * torch.linalg.vector_norm(want) and error <= 5e-3 * moved + 1e-7)
