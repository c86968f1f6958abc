"""The encoders that data sets may use, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

__all__ = ["ENCODERS", "IMAGE_ENCODERS", "EncoderInfo"]


@dataclass(kw_only=True, slots=True, frozen=True)
class EncoderInfo:
    """An encoder a data set may use.

    Attributes:
        build: Called with ``pretrained=True`` or without arguments.
        feature_dim: Channels of what it gives out.
        has_weights: There are pretrained weights of it.
    """

    build: Callable[..., nn.Module]
    feature_dim: int
    has_weights: bool = False


def _resnet(name: str, feature_dim: int) -> EncoderInfo:
    def build(pretrained: bool = False) -> nn.Module:
        from fastmtl import model

        if name.endswith("-dilated"):
            return model.resnet_dilated(name.removesuffix("-dilated"), pretrained=pretrained)
        return getattr(model, name)(pretrained=pretrained)

    return EncoderInfo(build=build, feature_dim=feature_dim, has_weights=True)


def _conv() -> nn.Module:
    from fastmtl.model import ConvEncoder

    return ConvEncoder(channels=3, stage_dims=(16, 32, 64))


def _segnet() -> nn.Module:
    from fastmtl.model import SegNet

    return SegNet()


def _lstm() -> nn.Module:
    from fastmtl.data.reviews import VOCABULARY
    from fastmtl.model import LSTMEncoder

    return LSTMEncoder(VOCABULARY)


ENCODERS: dict[str, EncoderInfo] = {
    "resnet18": _resnet("resnet18", 512),
    "resnet34": _resnet("resnet34", 512),
    "resnet50": _resnet("resnet50", 2048),
    "resnet18-dilated": _resnet("resnet18-dilated", 512),
    "resnet50-dilated": _resnet("resnet50-dilated", 2048),
    "conv": EncoderInfo(build=_conv, feature_dim=64),
    "segnet": EncoderInfo(build=_segnet, feature_dim=64),
    "lstm": EncoderInfo(build=_lstm, feature_dim=256),
}
IMAGE_ENCODERS = ("resnet18", "resnet34", "resnet50", "conv")
