"""ResNets as encoders: torchvision's networks without pooling and classifier."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from fastmtl.errors import FastmtlError
from fastmtl.model._torchvision import import_torchvision

_resnet = import_torchvision().models.resnet
BasicBlock = _resnet.BasicBlock
Bottleneck = _resnet.Bottleneck
conv1x1 = _resnet.conv1x1

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "conv1x1",
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


class ResNetOptions(TypedDict, total=False):
    """What torchvision's ``ResNet`` may be told."""

    num_classes: int
    zero_init_residual: bool
    groups: int
    width_per_group: int
    replace_stride_with_dilation: list[bool] | None
    norm_layer: Callable[..., nn.Module] | None


class ResNet(_resnet.ResNet):  # type: ignore[name-defined]
    """Encoder ``(batch, 3, h, w)`` to ``(batch, feature_dim, h / 32, w / 32)``, rounded up.

    The parts ``conv1``, ``bn1``, ``relu``, ``maxpool``, ``layer1`` .. ``layer4`` and the state_dict keys are LibMTL's,
    and a seed gives LibMTL's initial weights.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        layers: The number of blocks of each of the four layers.
        **kwargs: As of torchvision's ``ResNet``; ``num_classes`` is ignored, there is no classifier.

    Attributes:
        feature_dim: Channels of the output, 512 or 2048.
    """

    def __init__(self, block: type[nn.Module], layers: list[int], **kwargs: Unpack[ResNetOptions]) -> None:
        kwargs["num_classes"] = 0
        with warnings.catch_warnings():
            # A classifier of no classes draws no random numbers, so the seed's stream stays as without one.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            super().__init__(block, layers, **kwargs)
        self.feature_dim: int = self.fc.in_features
        del self.fc, self.avgpool

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the last layer."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _load_pretrained(model: ResNet, name: str, progress: bool) -> None:
    weights = import_torchvision().models.get_model_weights(name).IMAGENET1K_V1
    try:
        state = weights.get_state_dict(progress=progress, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise FastmtlError(
            f"The pretrained weights of {name} could not be downloaded from {weights.url} ({error}); "
            f"use pretrained=False, or put the file into {os.path.join(torch.hub.get_dir(), 'checkpoints')}."
        ) from error
    classifier = ("fc.weight", "fc.bias")
    model.load_state_dict({key: value for key, value in state.items() if key not in classifier})


def _build(
    name: str, block: type[nn.Module], layers: list[int], pretrained: bool, progress: bool, options: ResNetOptions
) -> ResNet:
    model = ResNet(block, layers, **options)
    if pretrained:
        _load_pretrained(model, name, progress)
    return model


def resnet18(pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-18 (He et al., `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_), 512 features.

    Args:
        pretrained: Load torchvision's ImageNet weights, from the network or torch.hub's cache.
        progress: Show the download's progress.
        **kwargs: As of torchvision's ``ResNet``.

    Raises:
        FastmtlError: The weights cannot be had.
    """
    return _build("resnet18", BasicBlock, [2, 2, 2, 2], pretrained, progress, kwargs)


def resnet34(pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-34, 512 features; arguments as :func:`resnet18`."""
    return _build("resnet34", BasicBlock, [3, 4, 6, 3], pretrained, progress, kwargs)


def resnet50(pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-50, 2048 features; arguments as :func:`resnet18`."""
    return _build("resnet50", Bottleneck, [3, 4, 6, 3], pretrained, progress, kwargs)


def resnet101(pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-101, 2048 features; arguments as :func:`resnet18`."""
    return _build("resnet101", Bottleneck, [3, 4, 23, 3], pretrained, progress, kwargs)


def resnet152(pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-152, 2048 features; arguments as :func:`resnet18`."""
    return _build("resnet152", Bottleneck, [3, 8, 36, 3], pretrained, progress, kwargs)


def resnext50_32x4d(pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet:
    """ResNeXt-50 32x4d, 2048 features; arguments as :func:`resnet18`.

    Source: Xie et al., `Aggregated Residual Transformations <https://arxiv.org/abs/1611.05431>`_.
    """
    kwargs |= {"groups": 32, "width_per_group": 4}
    return _build("resnext50_32x4d", Bottleneck, [3, 4, 6, 3], pretrained, progress, kwargs)


def resnext101_32x8d(pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet:
    """ResNeXt-101 32x8d, 2048 features; arguments as :func:`resnet18`."""
    kwargs |= {"groups": 32, "width_per_group": 8}
    return _build("resnext101_32x8d", Bottleneck, [3, 4, 23, 3], pretrained, progress, kwargs)


def wide_resnet50_2(pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet:
    """Wide ResNet-50-2, 2048 features; arguments as :func:`resnet18`.

    Source: Zagoruyko and Komodakis, `Wide Residual Networks <https://arxiv.org/abs/1605.07146>`_.
    """
    kwargs |= {"width_per_group": 128}
    return _build("wide_resnet50_2", Bottleneck, [3, 4, 6, 3], pretrained, progress, kwargs)


def wide_resnet101_2(pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet:
    """Wide ResNet-101-2, 2048 features; arguments as :func:`resnet18`."""
    kwargs |= {"width_per_group": 128}
    return _build("wide_resnet101_2", Bottleneck, [3, 4, 23, 3], pretrained, progress, kwargs)
