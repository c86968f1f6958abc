"""The work of a measured training step: the same network, data and start for everybody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.model import MLPEncoder, MoleculeEncoder, resnet18, resnet_dilated
from fastmtl.support.extras import need

__all__ = ["NETS", "Work", "image_size"]

NETS = ("resnet18", "resnet50", "mlp", "tiny", "transformer", "nnconv")
# Words, and numbers for each.
_WORDS, _WIDTH = 64, 256
# Layers, the first of which are the inputs.
_WIDTHS = {"mlp": (128, 512, 512, 512), "tiny": (16, 32, 32)}


@dataclass(kw_only=True)
class Work:
    """Classification tasks on one batch of noise.

    Attributes:
        net: ``"resnet18"``, or ``"resnet50"`` with dilations in place of its last strides, on images; ``"mlp"``
            (128-512-512-512) or ``"tiny"`` (16-32-32) on vectors; or ``"transformer"``, an encoder of 4 layers of width
            256, on 64 words; or ``"nnconv"``, the network of QM9, on graphs of as many atoms as molecules there have.
        arch: The architecture.
        count: Tasks.
        batch: Rows of the batch.
        size: Height and width of the images, as a number or ``"288x384"``.
        device: Where it runs.
        lr: Learning rate of plain SGD.
    """

    net: str
    arch: str
    count: int
    batch: int
    size: int | str
    device: torch.device
    lr: float = 1e-3
    inputs: Any = field(init=False)
    labels: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        if self.net not in NETS:
            raise UsageError(f"net must be one of {', '.join(NETS)}, got {self.net!r}.")
        generator = torch.Generator().manual_seed(0)
        if self.net == "nnconv":
            self.inputs = _molecules(self.batch, generator).to(self.device)
        else:
            self.inputs = torch.randn((self.batch, *self._of_one()), generator=generator).to(self.device)
        self.labels = {
            task: torch.randint(0, 10, (self.batch,), generator=generator).to(self.device) for task in self.tasks
        }

    def _of_one(self) -> tuple[int, ...]:
        of_one = _WIDTHS[self.net][:1] if self.net in _WIDTHS else (3, *image_size(self.size))
        return (_WORDS, _WIDTH) if self.net == "transformer" else of_one

    @property
    def tasks(self) -> list[str]:
        """Return the names of the tasks."""
        return [f"t{t}" for t in range(self.count)]

    @property
    def arch_args(self) -> dict[str, Any]:
        """Return the architecture's hyper-parameters: two shared experts, or one beside one of each task."""
        gated = {} if self.net == "nnconv" else {"img_size": list(self.inputs.shape[1:])}
        args: dict[str, dict[str, Any]] = {
            "MMoE": {**gated, "num_experts": [2]},
            "CGC": {**gated, "num_experts": [1] * (self.count + 1)},
            "PLE": {**gated, "num_experts": [1] * (self.count + 1)},
            "DSelect_k": {**gated, "num_experts": [2], "num_nonzeros": 2, "kgamma": 1.0},
        }
        return args.get(self.arch, {})

    def modules(self) -> tuple[nn.Module, nn.ModuleDict]:
        """Return encoder and decoders, each time in the same initial state."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder = self._encoder()
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if self.net.startswith("resnet") else []
            widths = {"resnet18": 512, "resnet50": 2048, "transformer": _WIDTH, "nnconv": 64}
            width = _WIDTHS[self.net][-1] if self.net in _WIDTHS else widths[self.net]
            decoders = nn.ModuleDict({task: nn.Sequential(*head, nn.Linear(width, 10)) for task in self.tasks})
        return encoder.to(self.device), decoders.to(self.device)

    def _encoder(self) -> nn.Module:
        if self.net in _WIDTHS:
            first, *hidden = _WIDTHS[self.net]
            return MLPEncoder(first, hidden)
        if self.net == "transformer":
            return _Words()
        if self.net == "nnconv":
            return MoleculeEncoder()
        return resnet18() if self.net == "resnet18" else resnet_dilated("resnet50", pretrained=False)

    def loss(self, pred: Tensor, task: str) -> Tensor:
        """Return the loss of one task."""
        return nn.functional.cross_entropy(pred, self.labels[task])


class _Words(nn.Module):
    """A transformer encoder, and the mean over the words."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(_WIDTH, 4, 4 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        """Return (B, width) from (B, words, width)."""
        encoded: Tensor = self.layers(words)
        return encoded.mean(1)


def _molecules(count: int, generator: torch.Generator) -> Any:
    """Return a batch of complete graphs with as many vertices as QM9's molecules have atoms: 18 +- 3."""
    data = need("torch_geometric.data", "graphs", "The network nnconv")
    sizes = (18 + 3 * torch.randn(count, generator=generator)).round().long().clamp(3, 29)
    ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    edges = []
    for first, size in zip(ptr.tolist(), sizes.tolist(), strict=False):
        pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        edges.append(pairs[pairs[:, 0] != pairs[:, 1]].T + first)
    edge_index = torch.cat(edges, 1)
    return data.Batch(
        x=torch.randn(int(ptr[-1]), 11, generator=generator),
        edge_index=edge_index,
        edge_attr=torch.randn(edge_index.shape[1], 5, generator=generator),
        batch=torch.repeat_interleave(torch.arange(count), sizes),
        ptr=ptr,
    )


def image_size(size: int | str) -> tuple[int, int]:
    """Return height and width of images described by a number or as ``"288x384"``.

    Raises:
        UsageError: It is neither.
    """
    parts = str(size).lower().split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UsageError(f"size must be a number, or height and width as 288x384, got {size!r}.")
    return int(parts[0]), int(parts[-1])
