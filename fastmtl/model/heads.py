"""Decoders that fit the features of any encoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.errors import UsageError

__all__ = ["DenseHead", "PooledHead"]

_WIDTH = 128


class PooledHead(nn.Module):
    """A decoder of vectors (batch, channels), sequences (batch, length, channels) or maps (batch, channels, h, w).

    The mean over positions, dropout and a linear layer: (batch, outputs).
    """

    def __init__(self, feature_dim: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(feature_dim, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Return (batch, outputs)."""
        if features.dim() == 4:
            features = features.mean((2, 3))
        elif features.dim() == 3:
            features = features.mean(1)
        return self.linear(self.dropout(features))


class DenseHead(nn.Module):
    """A decoder of maps (batch, channels, h', w') to maps of the size of the image: (batch, outputs, *size).

    A convolution of 128 channels with batch norm and ReLU, one of 1 x 1, and bilinear interpolation.
    """

    def __init__(self, feature_dim: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.convs = nn.Sequential(
            nn.Conv2d(feature_dim, _WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(),
            nn.Conv2d(_WIDTH, outputs, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return (batch, outputs, *size)."""
        if features.dim() != 4:
            raise UsageError(
                f"A task of maps needs an encoder of maps (batch, channels, h, w), got features of shape "
                f"{tuple(features.shape)}."
            )
        return F.interpolate(self.convs(features), self.size, mode="bilinear", align_corners=False)
