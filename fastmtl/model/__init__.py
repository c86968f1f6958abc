"""Encoders. The ResNets come from torchvision, which is imported when the first of them is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmtl.model.stages import ConvEncoder, MLPEncoder, StagedEncoder

if TYPE_CHECKING:
    from fastmtl.model.resnet import (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnext50_32x4d,
        resnext101_32x8d,
        wide_resnet50_2,
        wide_resnet101_2,
    )

__all__ = [
    "ConvEncoder",
    "MLPEncoder",
    "StagedEncoder",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("fastmtl.model.resnet"), name)
    raise AttributeError(f"module 'fastmtl.model' has no attribute {name!r}")
