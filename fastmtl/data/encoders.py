"""The encoders for the data sets, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

__all__ = ["ENCODERS", "IMAGE_ENCODERS", "VOCABULARY", "EncoderInfo"]

# Number of words that text encoders distinguish.
VOCABULARY = 8192


@dataclass(kw_only=True, slots=True, frozen=True)
class EncoderInfo:
    """An encoder: ``build()`` creates it, its output has ``feature_dim`` channels.

    If it ``has_weights``, ``build(pretrained=True)`` loads them.
    """

    build: Callable[..., nn.Module]
    feature_dim: int
    has_weights: bool = False


def _make(name: str, *args: object, **options: object) -> nn.Module:
    # So that torchvision is imported only for encoders that need it.
    from fastmtl import model

    return getattr(model, name)(*args, **options)


def _resnet(feature_dim: int, *call: str) -> EncoderInfo:
    return EncoderInfo(build=partial(_make, *call, pretrained=False), feature_dim=feature_dim, has_weights=True)


ENCODERS: dict[str, EncoderInfo] = {
    "resnet18": _resnet(512, "resnet18"),
    "resnet34": _resnet(512, "resnet34"),
    "resnet50": _resnet(2048, "resnet50"),
    "resnet18-dilated": _resnet(512, "resnet_dilated", "resnet18"),
    "resnet50-dilated": _resnet(2048, "resnet_dilated", "resnet50"),
    "conv": EncoderInfo(build=partial(_make, "ConvEncoder", channels=3, stage_dims=(16, 32, 64)), feature_dim=64),
    "segnet": EncoderInfo(build=partial(_make, "SegNet"), feature_dim=64),
    "lstm": EncoderInfo(build=partial(_make, "LSTMEncoder", VOCABULARY), feature_dim=256),
}
IMAGE_ENCODERS = ("resnet18", "resnet34", "resnet50", "conv")
