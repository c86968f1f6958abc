"""ResNets as encoders: torchvision's networks without pooling and classifier, dilated ones too."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Protocol, TypedDict, Unpack

import torch
from torch import Tensor, nn

from fastmtl.errors import FastmtlError, UsageError
from fastmtl.model._torchvision import import_torchvision
from fastmtl.support.names import resolve_name

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
    "resnet_dilated",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


class ResNetOptions(TypedDict, total=False):
    """Keyword arguments of torchvision's ``ResNet``."""

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
            # A classifier without classes draws no random numbers, so a seed gives LibMTL's weights.
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


class _Network(Protocol):
    def __call__(self, pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet: ...


_NETWORKS: dict[str, _Network] = {}
# Dilation of the layers without stride, by the total downscaling factor.
_DILATIONS = {8: {"layer3": 2, "layer4": 4}, 16: {"layer4": 2}}
_ARGUMENTS = """

    Args:
        pretrained: Load torchvision's ImageNet weights, downloaded or from torch.hub's cache.
        progress: Show the download's progress.
        **kwargs: As of torchvision's ``ResNet``.

    Raises:
        FastmtlError: The weights cannot be downloaded.
    """


def _network(
    name: str, about: str, block: type[nn.Module], layers: list[int], **defaults: Unpack[ResNetOptions]
) -> _Network:
    """Return torchvision's constructor ``name`` for encoders."""

    def build(pretrained: bool = False, progress: bool = True, **kwargs: Unpack[ResNetOptions]) -> ResNet:
        model = ResNet(block, layers, **(kwargs | defaults))
        if pretrained:
            _load_pretrained(model, name, progress)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{about}, {512 if block is BasicBlock else 2048} features.{_ARGUMENTS}"
    _NETWORKS[name] = build
    return build


_HE = "He et al., `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_"
_XIE = "Xie et al., `Aggregated Residual Transformations <https://arxiv.org/abs/1611.05431>`_"
_WIDE = "Zagoruyko and Komodakis, `Wide Residual Networks <https://arxiv.org/abs/1605.07146>`_"

resnet18 = _network("resnet18", f"ResNet-18 ({_HE})", BasicBlock, [2, 2, 2, 2])
resnet34 = _network("resnet34", f"ResNet-34 ({_HE})", BasicBlock, [3, 4, 6, 3])
resnet50 = _network("resnet50", f"ResNet-50 ({_HE})", Bottleneck, [3, 4, 6, 3])
resnet101 = _network("resnet101", f"ResNet-101 ({_HE})", Bottleneck, [3, 4, 23, 3])
resnet152 = _network("resnet152", f"ResNet-152 ({_HE})", Bottleneck, [3, 8, 36, 3])
resnext50_32x4d = _network(
    "resnext50_32x4d", f"ResNeXt-50 32x4d ({_XIE})", Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4
)
resnext101_32x8d = _network(
    "resnext101_32x8d", f"ResNeXt-101 32x8d ({_XIE})", Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=8
)
wide_resnet50_2 = _network(
    "wide_resnet50_2", f"Wide ResNet-50-2 ({_WIDE})", Bottleneck, [3, 4, 6, 3], width_per_group=128
)
wide_resnet101_2 = _network(
    "wide_resnet101_2", f"Wide ResNet-101-2 ({_WIDE})", Bottleneck, [3, 4, 23, 3], width_per_group=128
)


def resnet_dilated(basenet: str, pretrained: bool = True, dilate_scale: int = 8) -> ResNet:
    """Return a ResNet whose output is 1/8 or 1/16 of the image's size in place of 1/32.

    Strides become dilations, so parameters, state_dict keys and pretrained weights are those of the plain ResNet.

    Source: Yu, Koltun and Funkhouser, `Dilated Residual Networks <https://arxiv.org/abs/1705.09914>`_.

    Args:
        basenet: Name of a ResNet of ``fastmtl.model``, as ``"resnet50"``.
        pretrained: Load torchvision's ImageNet weights, downloaded or from torch.hub's cache.
        dilate_scale: The total downscaling factor, 8 or 16.

    Raises:
        UsageError: An unknown ResNet or scale.
        FastmtlError: The weights cannot be downloaded.
    """
    if dilate_scale not in _DILATIONS:
        raise UsageError(f"dilate_scale must be 8 or 16, got {dilate_scale}.")
    model = resolve_name(basenet, _NETWORKS, "ResNet")(pretrained=pretrained)
    for layer, dilation in _DILATIONS[dilate_scale].items():
        for module in model.get_submodule(layer).modules():
            if isinstance(module, nn.Conv2d):
                _dilate(module, dilation)
    return model


def _dilate(conv: nn.Conv2d, dilation: int) -> None:
    # The input of a layer's strided convolution has the density of the layer before.
    reach = dilation // 2 if conv.stride == (2, 2) else dilation
    conv.stride = (1, 1)
    if conv.kernel_size == (3, 3):
        conv.dilation = conv.padding = (reach, reach)
