"""A network that is a chain of modules, cut into stages where its maps become smaller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.model.stages import StagedEncoder

__all__ = ["STAGES", "ChannelsFirst", "ChannelsLast", "by_size", "staged"]

# Stages of a network for the architectures that use them, at most.
STAGES = 4


class ChannelsFirst(nn.Module):
    """Maps (batch, h, w, channels) as (batch, channels, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps, channels first."""
        return x.permute(0, 3, 1, 2)


class ChannelsLast(nn.Module):
    """Maps (batch, channels, h, w) as (batch, h, w, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps, channels last."""
        return x.permute(0, 2, 3, 1)


def by_size(chain: Sequence[nn.Module], image: Tensor) -> list[list[nn.Module]]:
    """Group the modules of a chain by the size of their outputs for an image (1, channels, h, w).

    The first group has what comes before the last few sizes, and may be empty.
    """
    groups: list[list[nn.Module]] = []
    size: torch.Size | None = None
    x = image
    modes = [(module, module.training) for part in chain for module in part.modules()]
    with torch.no_grad():
        for part in chain:
            part.eval()
            x = part(x)
            if x.dim() == 4 and x.shape[-2:] != size:
                groups.append([])
                size = x.shape[-2:]
            if not groups:
                groups.append([])
            groups[-1].append(part)
    for module, training in modes:
        module.training = training
    cut = max(len(groups) - STAGES, 0)
    return [[part for group in groups[:cut] for part in group], *groups[cut:]]


def staged(stem: Sequence[nn.Module], stages: Sequence[Sequence[nn.Module]], image: Tensor, name: str) -> StagedEncoder:
    """Return the encoder of a stem and stages, whose channels it finds out with an image (1, channels, h, w).

    Raises:
        UsageError: A stage gives no maps or vectors, channels second or sequences of them last.
    """
    parts = [nn.Sequential(*stem), *(_joined(stage) for stage in stages)]
    whole = nn.ModuleList(parts)
    training = [module.training for module in whole.modules()]
    dims, x = [], image
    with torch.no_grad():
        whole.eval()
        for part in parts:
            x = part(x)
            if not isinstance(x, Tensor) or x.dim() not in (3, 4):
                raise UsageError(f"{name} has stages that give no maps (batch, channels, h, w) or sequences.")
            dims.append(x.shape[1] if x.dim() == 4 else x.shape[2])
    for module, mode in zip(whole.modules(), training, strict=True):
        module.training = mode
    encoder = StagedEncoder(parts[0] if stem else nn.Identity(), parts[1:], dims[1:])
    encoder.maps = x.dim() == 4
    return encoder


def _joined(stage: Sequence[nn.Module]) -> nn.Module:
    return stage[0] if len(stage) == 1 else nn.Sequential(*stage)
