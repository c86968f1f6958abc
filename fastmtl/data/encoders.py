"""The encoders by name: for the data sets of the package, of other libraries, and of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fastmtl.errors import UsageError
from fastmtl.model.info import EncoderInfo
from fastmtl.support.named import Found, Kind, is_spec, line_in_own_code, place_of, short_name
from fastmtl.support.names import resolve_name

__all__ = ["ENCODERS", "IMAGE_ENCODERS", "LIBRARIES", "VOCABULARY", "EncoderInfo", "find_encoder"]

# Number of words that text encoders distinguish.
VOCABULARY = 8192


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
    "segnet-mtan": EncoderInfo(build=partial(_make, "SegNet_MTAN_encoder"), feature_dim=64),
    "lenet": EncoderInfo(build=partial(_make, "LeNet"), feature_dim=50),
    "conv9": EncoderInfo(build=partial(_make, "CelebANet"), feature_dim=512),
    "lstm": EncoderInfo(build=partial(_make, "LSTMEncoder", VOCABULARY), feature_dim=256),
    "nnconv": EncoderInfo(build=partial(_make, "MoleculeEncoder"), feature_dim=64),
    "pinn-burgers": EncoderInfo(build=partial(_make, "PhysicsEncoder"), feature_dim=1),
    "pinn-kovasznay": EncoderInfo(build=partial(_make, "PhysicsEncoder", fields=3), feature_dim=3),
    "mlp": EncoderInfo(build=partial(_make, "MLPEncoder"), feature_dim=128, takes_vectors=True),
}
IMAGE_ENCODERS = ("resnet18", "resnet34", "resnet50", "conv", "lenet")


def _timm(name: str, args: Mapping[str, Any], stages: bool) -> EncoderInfo:
    from fastmtl.model.from_timm import timm_encoder

    return timm_encoder(name, args, stages=stages)


def _torchvision(name: str, args: Mapping[str, Any], stages: bool) -> EncoderInfo:
    from fastmtl.model.from_torchvision import torchvision_encoder

    return torchvision_encoder(name, args, stages=stages)


def _hf(name: str, args: Mapping[str, Any], stages: bool) -> EncoderInfo:
    from fastmtl.model.from_hf import hf_encoder

    return hf_encoder(name, args)


def _geometric(name: str, args: Mapping[str, Any], stages: bool) -> EncoderInfo:
    from fastmtl.model.from_geometric import geometric_encoder

    return geometric_encoder(name, args)


# Other libraries, by what stands before the colon.
LIBRARIES: dict[str, Callable[[str, Mapping[str, Any], bool], EncoderInfo]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hf,
    "torch_geometric": _geometric,
}


def find_encoder(
    name: str,
    args: Mapping[str, Any] | None = None,
    *,
    stages: bool = False,
    fitting: tuple[str, ...] = (),
    of: str = "",
) -> Found[EncoderInfo]:
    """Return the encoder of a name.

    Args:
        name: One of ``ENCODERS``; of another library, such as ``timm:convnext_tiny``, ``torchvision:convnext_tiny``,
            ``hf:<name or folder>`` or ``torch_geometric:GCN``; of an entry point of the group ``fastmtl.encoders``; or
            ``module:name`` or ``file.py:name`` of a class or function that makes one.
        args: Its arguments.
        stages: Whether the architecture attaches something to its stages.
        fitting: Those of ``ENCODERS`` that the data set allows; all if empty.
        of: The data set's name.

    Raises:
        UsageError: There is no such encoder, its library is not installed, or it cannot be made as asked.
    """
    args = dict(args or {})
    library, _, rest = name.partition(":")
    if library in LIBRARIES and rest and not rest.endswith(".py"):
        return Found(name, LIBRARIES[library](rest, args, stages))
    fits = {known: ENCODERS[known] for known in fitting} if fitting else ENCODERS
    if name in ENCODERS and not is_spec(name):
        found: Found[Any] = Found(name, resolve_name(name, fits, f"encoder of {of}"))
    else:
        found = Kind(f"encoder of {of}" if of else "encoder", "fastmtl.encoders").find(name, fits)
    if not isinstance(found.value, EncoderInfo):
        return Found(found.name, _of_users(found.value, found.name, args))
    if args:
        about = found.value
        return Found(found.name, _with_args(about, found.name, args))
    return Found(found.name, found.value)


def _with_args(about: EncoderInfo, name: str, args: Mapping[str, Any]) -> EncoderInfo:
    make = partial(about.build, **args)
    made = _made(partial(make, **({"inputs": 4} if about.takes_vectors else {})), name, args)
    return EncoderInfo(
        build=make,
        feature_dim=_width(made, name, name),
        has_weights=about.has_weights,
        image=about.image,
        tokenize=about.tokenize,
        takes_vectors=about.takes_vectors,
    )


def _of_users(make: Any, name: str, args: Mapping[str, Any]) -> EncoderInfo:
    """Return what is known of an encoder that a class or function of the user's makes."""
    if not callable(make) or isinstance(make, nn.Module):
        raise UsageError(
            f"{place_of(make, name)}: the encoder {short_name(name)} must be a class or function that makes an "
            f"nn.Module, it is a {type(make).__name__}."
        )
    try:
        parameters = list(inspect.signature(make).parameters)
    except ValueError:
        parameters = []
    takes_vectors = "inputs" in parameters and "inputs" not in args
    made = _made(partial(make, **args, **({"inputs": 4} if takes_vectors else {})), name, args, make)
    return EncoderInfo(
        build=partial(make, **args),
        feature_dim=_width(made, name, place_of(make, name)),
        has_weights="pretrained" in parameters,
        tokenize=getattr(made, "tokenize", None),
        image=getattr(made, "image", None),
        takes_vectors=takes_vectors,
    )


def _made(make: Callable[[], Any], name: str, args: Mapping[str, Any], owner: Any = None) -> Any:
    """Make an encoder to look at; it leaves no trace in the random numbers."""
    place = name if owner is None else place_of(owner, name)
    with torch.random.fork_rng([]):
        try:
            made = make()
        except TypeError as error:
            place = line_in_own_code(error) or place
            raise UsageError(
                f"{place}: the encoder {short_name(name)} cannot be made with {dict(args) or 'no arguments'}: {error}."
            ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"{place}: the encoder {short_name(name)} must make an nn.Module, it makes a {type(made).__name__}."
        )
    return made


def _width(encoder: nn.Module, name: str, place: str) -> int:
    width = getattr(encoder, "feature_dim", None)
    if not isinstance(width, int):
        raise UsageError(
            f"{place}: the encoder {short_name(name)} needs an attribute feature_dim, the channels of its output."
        )
    return width
