"""Encoders made of stages, for architectures that use the features of each stage, such as MTAN.

The stages of a ResNet are its layers; any other encoder can be a :class:`StagedEncoder`::

    stem    = nn.Linear(20, 64)
    stages  = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Sequential(nn.Linear(64, 32), nn.ReLU())]
    encoder = StagedEncoder(stem, stages, stage_dims=[64, 32])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from fastmtl.errors import UsageError

__all__ = ["ConvEncoder", "MLPEncoder", "StagedEncoder", "mask", "norm", "pointwise"]


class StagedEncoder(nn.Module):
    """An encoder that runs ``stem`` and then its ``stages`` in turn.

    Images are ``(batch, channels, h, w)``, vectors ``(batch, channels)``; the outputs of stem and stages must all have
    the same number of dimensions. A stage may reduce h and w.

    Args:
        stem: The module before the first stage, or ``nn.Identity()``.
        stages: The stages, at least one. If a stage is an ``nn.Sequential``, MTAN reads the input of its last part,
            which must then not be in place.
        stage_dims: Channels of each stage's output.

    Attributes:
        feature_dim: Channels of the last stage's output.
        maps: Whether features are images (batch, channels, h, w), not vectors (batch, channels) or sequences of them
            (batch, length, channels); None if its layers say: they are with a convolution among them.
    """

    maps: bool | None = None

    def __init__(self, stem: nn.Module, stages: Iterable[nn.Module], stage_dims: Sequence[int]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.stage_dims = list(stage_dims)
        if not self.stages or len(self.stages) != len(self.stage_dims):
            raise UsageError(
                f"StagedEncoder needs at least one stage and one entry of stage_dims per stage, "
                f"got {len(self.stages)} stages and stage_dims={self.stage_dims}."
            )
        self.feature_dim = self.stage_dims[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the last stage's output."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x


def _conv(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class ConvEncoder(StagedEncoder):
    """A small encoder of images of some ``channels``; each stage after the first halves h and w.

    A stage is convolution, batch norm and ReLU, and has ``stage_dims`` channels.
    """

    def __init__(self, channels: int = 3, stage_dims: Sequence[int] = (32, 64, 128)) -> None:
        dims = [channels, *stage_dims]
        stages = [_conv(a, b, stride=1 if k == 0 else 2) for k, (a, b) in enumerate(pairwise(dims))]
        super().__init__(nn.Identity(), stages, stage_dims)


class MLPEncoder(StagedEncoder):
    """An encoder of vectors ``(batch, inputs)``: a linear layer to ``stage_dims`` with ReLU per stage."""

    def __init__(self, inputs: int, stage_dims: Sequence[int] = (256, 256, 128)) -> None:
        dims = [inputs, *stage_dims]
        stages = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(dims)]
        super().__init__(nn.Identity(), stages, stage_dims)


def pointwise(dim_in: int, dim_out: int, maps: bool, bias: bool = True) -> nn.Module:
    """Return a linear layer for each position of maps, or for vectors."""
    return nn.Conv2d(dim_in, dim_out, 1, bias=bias) if maps else nn.Linear(dim_in, dim_out, bias=bias)


def norm(dim: int, maps: bool) -> nn.Module:
    """Return a batch norm for maps, or for vectors."""
    return nn.BatchNorm2d(dim) if maps else nn.BatchNorm1d(dim)


def mask(dim_in: int, dim_mid: int, dim_out: int, maps: bool = True) -> nn.Sequential:
    """Return MTAN's attention module, whose output in 0 .. 1 multiplies features."""
    return nn.Sequential(
        pointwise(dim_in, dim_mid, maps),
        norm(dim_mid, maps),
        nn.ReLU(inplace=True),
        pointwise(dim_mid, dim_out, maps),
        norm(dim_out, maps),
        nn.Sigmoid(),
    )
