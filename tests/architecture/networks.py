"""Small encoders of every kind, and networks and trainers made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.architecture import ARCHITECTURES
from fastmtl.model import ConvEncoder, MLPEncoder, StagedEncoder

__all__ = ["ENCODERS", "FEATURES", "GATED", "SPLITS", "TASKS", "build", "make_inputs"]

TASKS = ["task0", "task1", "task2"]
FEATURES = 8
GATED = ["MMoE", "CGC", "PLE", "DSelect_k"]
SPLITS = ["HPS", "MTAN", "Cross_stitch", "MMoE", "CGC", "DSelect_k", "LTB", "STL", "ESMM", "AITM"]


class Text(nn.Module):
    """A sequence model of one piece: (B, L) token ids to (B, L, 8)."""

    feature_dim = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.recurrent = nn.GRU(6, FEATURES, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.recurrent(self.embedding(tokens))[0]


def _staged_text() -> nn.Module:
    stages = [nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.TransformerEncoderLayer(5, 1, 8, 0.0, batch_first=True)]
    return StagedEncoder(nn.Embedding(11, 6), [*stages, nn.Linear(5, FEATURES)], [5, 5, FEATURES])


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "table": lambda: MLPEncoder(6, (7, FEATURES)),
    "image": lambda: ConvEncoder(3, (4, 6, FEATURES)),
    "text": _staged_text,
    "whole text": Text,
}


def make_inputs(kind: str, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if "text" in kind:
        return torch.randint(0, 11, (rows, 9), generator=generator)
    return torch.randn(rows, *((6,) if kind == "table" else (3, 8, 8)), generator=generator)


class _Mean(nn.Module):
    def __init__(self, image: bool) -> None:
        super().__init__()
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if self.image else x.mean(1) if x.dim() == 3 else x


def build(name: str, kind: str = "table", **options: Any) -> Any:
    """Return an architecture over encoders of a kind, with a decoder of three outputs per task."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"encoder_class": ENCODERS[kind], "rep_grad": False, "multi_input": False, **options}
    decoders = nn.ModuleDict({task: nn.Sequential(_Mean(kind == "image"), nn.Linear(FEATURES, 3)) for task in TASKS})
    return ARCHITECTURES[name](task_name=TASKS, decoders=decoders, device=torch.device("cpu"), **given)
