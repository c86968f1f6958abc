"""Networks of timm as encoders: ``timm:convnext_tiny``; those with ``features_only`` also as stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmtl.errors import FastmtlError, UsageError
from fastmtl.model.chain import STAGES, ChannelsFirst, ChannelsLast, by_size, staged
from fastmtl.model.info import EncoderInfo, ImageInput
from fastmtl.model.stages import StagedEncoder
from fastmtl.support.extras import need
from fastmtl.support.names import did_you_mean

__all__ = ["timm_encoder"]


class TimmEncoder(nn.Module):
    """A network of timm without its classifier.

    Args:
        model: The network.

    Attributes:
        feature_dim: Channels of its output.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.feature_dim: int = model.num_features
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, feature_dim, h, w), or (batch, length, feature_dim) of networks without a grid of tokens."""
        model: Any = self.model
        features: Tensor = model.forward_features(images)
        if features.dim() == 4:
            return features.permute(0, 3, 1, 2) if self._channels_last else features
        embed: Any = getattr(model, "patch_embed", None)
        if features.dim() == 3 and hasattr(embed, "dynamic_feat_size"):
            tokens = features[:, getattr(model, "num_prefix_tokens", 0) :]
            height, width = embed.dynamic_feat_size(images.shape[-2:])
            if tokens.shape[1] == height * width:
                return tokens.transpose(1, 2).unflatten(2, (height, width))
        return features


class _Embedding(nn.Module):
    """What a vision transformer of timm does before its blocks: images to tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.blocks, model.norm = nn.Sequential(), nn.Identity()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        tokens: Tensor = model._pos_embed(model.patch_embed(images))
        for part in ("patch_drop", "norm_pre"):
            tokens = getattr(model, part)(tokens) if hasattr(model, part) else tokens
        return tokens


def timm_encoder(name: str, args: Mapping[str, Any], *, stages: bool) -> EncoderInfo:
    """Return what is known of a network of timm.

    Args:
        name: A name of timm, with or without the tag of its weights.
        args: Arguments of ``timm.create_model``.
        stages: Whether it shall be made of stages.

    Raises:
        UsageError: timm is not installed, has no such network, or the network has no stages.
    """
    timm = need("timm", "timm", f"The encoder timm:{name}")
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}.{did_you_mean(name, timm.list_models())}")
    make = partial(_build, name, dict(args), stages)
    with torch.random.fork_rng([]):
        made: Any = make()
    settings, usual = timm.get_pretrained_cfg(name), ImageInput()
    size = _input_size(name)
    image = ImageInput(
        size=(size[1], size[2]),
        mean=tuple(getattr(settings, "mean", usual.mean)),
        std=tuple(getattr(settings, "std", usual.std)),
    )
    return EncoderInfo(build=make, feature_dim=made.feature_dim, has_weights=True, image=image)


def _build(name: str, args: Mapping[str, Any], stages: bool, pretrained: bool = False) -> nn.Module:
    timm = need("timm", "timm", f"The encoder timm:{name}")
    make = partial(timm.create_model, name, pretrained=pretrained, **args)
    if not stages:
        encoder = TimmEncoder(_made(partial(make, num_classes=0), name, args))
        _freeze_unreached(encoder, _input_size(name))
        return encoder
    try:
        features = make(features_only=True)
    except OSError as error:
        raise _not_downloaded(name, error) from error
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"timm:{name} has no features_only form, which an architecture over stages needs ({error or 'none'})."
        ) from error
    return _staged(features, name, _input_size(name))


def _freeze_unreached(encoder: nn.Module, size: Sequence[int]) -> None:
    """Freeze what features do not go through, such as the norm of the classifier that is left out."""
    shapes = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(isinstance(tensor, nn.Parameter))
        for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers())
    }
    params = dict(encoder.named_parameters())
    was_training = encoder.training
    try:
        features = functional_call(encoder.eval(), shapes, (torch.empty(1, *size, device="meta"),))
        grads = torch.autograd.grad(features.sum(), [shapes[name] for name in params], allow_unused=True)
    except (NotImplementedError, RuntimeError):
        # It computes something that has no shapes without values: all of it stays as it is.
        return
    finally:
        encoder.train(was_training)
    for param, grad in zip(params.values(), grads, strict=True):
        param.requires_grad_(grad is not None)


def _input_size(name: str) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a network was made for."""
    timm = need("timm", "timm", f"The encoder timm:{name}")
    return getattr(timm.get_pretrained_cfg(name), "input_size", None) or (3, 224, 224)


def _made(make: Any, name: str, args: Mapping[str, Any]) -> Any:
    try:
        return make()
    except OSError as error:
        raise _not_downloaded(name, error) from error
    except TypeError as error:
        raise UsageError(f"timm:{name} cannot be made with {dict(args)}: {error}.") from error


def _not_downloaded(name: str, error: Exception) -> FastmtlError:
    return FastmtlError(f"The weights of timm:{name} could not be downloaded ({error}): leave pretrained off.")


def _staged(features: Any, name: str, size: Sequence[int]) -> StagedEncoder:
    """Return a features_only network as an encoder of stages.

    Raises:
        UsageError: It cannot be cut into stages.
    """
    image = torch.zeros(1, *size)
    whole = features.model if hasattr(features, "model") else getattr(features, "body", features)
    channels_last = "NHWC" in str(getattr(features, "output_fmt", getattr(whole, "output_fmt", "")))
    if hasattr(features, "return_layers"):
        groups = _by_layer(list(features.items()), features.return_layers)
    elif hasattr(whole, "conv_stem") and hasattr(whole, "blocks"):
        parts = (*(getattr(whole, part, None) for part in ("conv_stem", "bn1", "act1")), *whole.blocks)
        groups = by_size([part for part in parts if isinstance(part, nn.Module)], image)
    elif hasattr(whole, "_pos_embed") and hasattr(whole, "blocks"):
        groups = _of_blocks(whole)
    elif hasattr(whole, "patch_embed") and hasattr(whole, "layers") and channels_last:
        groups = [[whole.patch_embed], *([layer] for layer in whole.layers)]
    else:
        raise _uncut(name)
    if channels_last:
        # The images themselves have their channels first.
        first = next(place for place, group in enumerate(groups) if group)
        groups = [_channels_first(group, first=place == first) for place, group in enumerate(groups)]
    try:
        return staged(groups[0], groups[1:], image, f"timm:{name}")
    except (AttributeError, RuntimeError, TypeError) as error:
        # Its stages do more than pass one tensor on.
        raise _uncut(name) from error


def _by_layer(chain: list[tuple[str, nn.Module]], ends: Mapping[str, Any]) -> list[list[nn.Module]]:
    """Group the modules of a chain by the feature that each is part of; the first group has what comes before four."""
    groups: list[list[nn.Module]] = [[]]
    for key, part in chain:
        groups[-1].append(part)
        if key in ends:
            groups.append([])
    groups = groups[:-1]
    cut = max(len(groups) - STAGES, 0)
    return [[part for group in groups[:cut] for part in group], *groups[cut:]]


def _channels_first(group: Sequence[nn.Module], *, first: bool) -> list[nn.Module]:
    """Return modules of maps with their channels last as one of maps with their channels first."""
    if not group:
        return []
    return [nn.Sequential(*([] if first else [ChannelsLast()]), *group, ChannelsFirst())]


def _of_blocks(model: Any) -> list[list[nn.Module]]:
    """Return a vision transformer's embedding and four groups of its blocks."""
    blocks = list(model.blocks)
    count = min(STAGES, len(blocks))
    cuts = [round(len(blocks) * k / count) for k in range(count + 1)]
    groups = [blocks[a:b] for a, b in pairwise(cuts)]
    if isinstance(getattr(model, "norm", None), nn.Module):
        groups[-1].append(model.norm)
    return [[_Embedding(model)], *groups]


def _uncut(name: str) -> UsageError:
    return UsageError(f"timm:{name} cannot be cut into stages: take it with HPS, MMoE, CGC, DSelect_k or STL.")
