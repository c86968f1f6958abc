"""Dilated ResNets: the last layers keep their resolution and look further apart instead."""

from __future__ import annotations

from torch import nn

from fastmtl.errors import UsageError
from fastmtl.model import resnet
from fastmtl.model.resnet import ResNet
from fastmtl.support.names import resolve_name

__all__ = ["resnet_dilated"]

# Dilation of the layers that no longer halve the image, by the factor by which the network shrinks it in all.
_DILATIONS = {8: {"layer3": 2, "layer4": 4}, 16: {"layer4": 2}}
_NAMES = {name: name for name in resnet.__all__ if name.startswith(("resne", "wide_"))}


def resnet_dilated(basenet: str, pretrained: bool = True, dilate_scale: int = 8) -> ResNet:
    """Return a ResNet whose output is 1/8 or 1/16 of the image's size in place of 1/32.

    Strides become dilations, so parameters, state_dict keys and pretrained weights are those of the plain ResNet.

    Source: Yu, Koltun and Funkhouser, `Dilated Residual Networks <https://arxiv.org/abs/1705.09914>`_.

    Args:
        basenet: Name of a ResNet of ``fastmtl.model``, as ``"resnet50"``.
        pretrained: Load torchvision's ImageNet weights, from the network or torch.hub's cache.
        dilate_scale: 8 or 16, by how much the network shrinks an image.

    Raises:
        UsageError: An unknown ResNet or scale.
        FastmtlError: The weights cannot be had.
    """
    if dilate_scale not in _DILATIONS:
        raise UsageError(f"dilate_scale must be 8 or 16, got {dilate_scale}.")
    model: ResNet = getattr(resnet, resolve_name(basenet, _NAMES, "ResNet"))(pretrained=pretrained)
    for layer, dilation in _DILATIONS[dilate_scale].items():
        for module in model.get_submodule(layer).modules():
            if isinstance(module, nn.Conv2d):
                _dilate(module, dilation)
    return model


def _dilate(conv: nn.Conv2d, dilation: int) -> None:
    # What enters a layer's strided convolution is still as dense as the layer before gave it.
    reach = dilation // 2 if conv.stride == (2, 2) else dilation
    conv.stride = (1, 1)
    if conv.kernel_size == (3, 3):
        conv.dilation = conv.padding = (reach, reach)
