"""Networks of torchvision as encoders: ``torchvision:convnext_tiny``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import FastmtlError, UsageError
from fastmtl.model._torchvision import import_torchvision
from fastmtl.model.chain import ChannelsFirst, ChannelsLast, by_size, staged
from fastmtl.model.info import EncoderInfo, ImageInput
from fastmtl.support.names import did_you_mean

__all__ = ["torchvision_encoder"]


class _Chain(nn.Sequential):
    """A network without its classifier.

    Attributes:
        feature_dim: Channels of its output (batch, feature_dim, h, w).
    """

    feature_dim: int


class _Tokens(nn.Module):
    """A vision transformer whose output tokens are arranged as a map."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        del model.heads
        self.feature_dim: int = model.hidden_dim

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, feature_dim, h / patch, w / patch), without the class token."""
        model: Any = self.model
        height, width = (size // model.patch_size for size in images.shape[-2:])
        tokens = model._process_input(images)
        tokens = torch.cat([model.class_token.expand(len(tokens), -1, -1), tokens], 1)
        return model.encoder(tokens)[:, 1:].transpose(1, 2).unflatten(2, (height, width))


def torchvision_encoder(name: str, args: Mapping[str, Any], *, stages: bool) -> EncoderInfo:
    """Return what is known of a network of torchvision.

    Args:
        name: A name of ``torchvision.models`` for classification.
        args: Arguments of its constructor.
        stages: Whether it shall be made of stages.

    Raises:
        UsageError: There is no such network, or it has no stages.
        BackendError: torchvision is not installed.
    """
    models = import_torchvision().models
    names = models.list_models(module=models)
    if name not in names:
        raise UsageError(f"torchvision has no model {name!r}.{did_you_mean(name, names)}")
    make = partial(_build, name, dict(args), stages)
    with torch.random.fork_rng([]):
        made: Any = make()
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    size = transforms.crop_size[0]
    image = ImageInput(size=(size, size), mean=tuple(transforms.mean), std=tuple(transforms.std))
    return EncoderInfo(build=make, feature_dim=made.feature_dim, has_weights=True, image=image)


def _build(name: str, args: Mapping[str, Any], stages: bool, pretrained: bool = False) -> nn.Module:
    models = import_torchvision().models
    weights = models.get_model_weights(name).DEFAULT if pretrained else None
    try:
        model = models.get_model(name, weights=weights, **args)
    except (TypeError, ValueError) as error:
        raise UsageError(f"torchvision:{name} cannot be made with {dict(args)}: {error}.") from error
    except OSError as error:
        raise FastmtlError(f"The weights of torchvision:{name} could not be downloaded ({error}).") from error
    size = models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    image = torch.zeros(1, 3, size, size)
    if hasattr(model, "_process_input"):
        if stages:
            raise UsageError(f"torchvision:{name} is not made of stages: take timm's, or HPS, MMoE, CGC or DSelect_k.")
        return _Tokens(model)
    chain = _chain(model, name)
    if stages:
        stem, *groups = by_size(chain, image)
        return staged(stem, groups, image, f"torchvision:{name}")
    encoder = _Chain(*chain)
    with torch.no_grad():
        training = encoder.training
        encoder.feature_dim = encoder.eval()(image).shape[1]
        encoder.train(training)
    return encoder


def _chain(model: Any, name: str) -> list[nn.Module]:
    """Return the modules that take images to maps, in order."""
    attributes = (
        ("features",),
        ("layers",),
        ("stem", "trunk_output"),
        ("stem", "blocks"),
        ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),
        ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
    )
    for names in attributes:
        if all(hasattr(model, part) for part in names):
            parts = [getattr(model, part) for part in names]
            chain = [module for part in parts for module in (part if _is_chain(part) else [part])]
            if hasattr(model, "permute") and hasattr(model, "norm"):
                # Swin's maps have their channels last.
                first, *others = [*chain, model.norm]
                chain = [first, ChannelsFirst()]
                chain += [nn.Sequential(ChannelsLast(), part, ChannelsFirst()) for part in others]
            return chain
    raise UsageError(f"torchvision:{name} cannot be an encoder: its features are no chain of modules.")


def _is_chain(part: nn.Module) -> bool:
    return type(part).__name__ in ("Sequential", "ModuleList") and len(list(part.children())) > 0
