"""Encoders and decoders; torchvision is imported on the first use of those that need it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastmtl.errors import UsageError
from fastmtl.model.features import Bag, Categorical, FeatureEncoder, FeatureTables, Numeric
from fastmtl.model.nnconv import EdgeConv, MoleculeEncoder
from fastmtl.model.pinn import PhysicsEncoder
from fastmtl.model.published_nets import CelebANet, LeNet
from fastmtl.model.segnet import SegNet, SegNet_MTAN_decoder, SegNet_MTAN_encoder
from fastmtl.model.stages import ConvEncoder, MLPEncoder, StagedEncoder
from fastmtl.model.text import LSTMEncoder

if TYPE_CHECKING:
    from fastmtl.model.deeplab import DeepLabHead
    from fastmtl.model.resnet import (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        resnet_dilated,
        resnext50_32x4d,
        resnext101_32x8d,
        wide_resnet50_2,
        wide_resnet101_2,
    )

__all__ = [
    "Bag",
    "Categorical",
    "CelebANet",
    "ConvEncoder",
    "DeepLabHead",
    "EdgeConv",
    "FeatureEncoder",
    "FeatureTables",
    "LSTMEncoder",
    "LeNet",
    "MLPEncoder",
    "MoleculeEncoder",
    "Numeric",
    "PhysicsEncoder",
    "SegNet",
    "SegNet_MTAN_decoder",
    "SegNet_MTAN_encoder",
    "StagedEncoder",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet_dilated",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

_FORMERLY = {f"ResNet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}


def __getattr__(name: str) -> object:
    if name in __all__:
        module = "deeplab" if name == "DeepLabHead" else "resnet"
        return getattr(importlib.import_module(f"fastmtl.model.{module}"), name)
    if name in _FORMERLY:
        raise UsageError(f"{name} is now called {_FORMERLY[name]}: from fastmtl.model import {_FORMERLY[name]}.")
    raise AttributeError(f"module 'fastmtl.model' has no attribute {name!r}")
