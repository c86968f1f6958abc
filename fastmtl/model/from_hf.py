"""Models of Hugging Face's transformers as encoders: ``hf:distilbert-base-uncased``, ``hf:./folder``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastmtl.errors import FastmtlError, UsageError
from fastmtl.model.info import EncoderInfo, ImageInput
from fastmtl.support.extras import need

__all__ = ["HFEncoder", "hf_encoder"]

# Seconds to wait for the hub's answer.
_PATIENCE = 5.0
# Seconds after which it is asked again whether it can be reached.
_KEEPS = 60.0

# Arguments of ours; all others are LoraConfig's, or the configuration's.
_LORA = ("lora_alpha", "lora_dropout", "target_modules")


class HFEncoder(nn.Module):
    """A model of transformers: of texts to one vector each, of images to maps.

    Args:
        model: The model.
        pool: Of texts ``"mean"`` over their words, or ``"first"``, the vector of the first token.

    Attributes:
        feature_dim: Channels of its output.
    """

    def __init__(self, model: Any, pool: str = "mean") -> None:
        super().__init__()
        if pool not in ("mean", "first"):
            raise UsageError(f"pool must be mean or first, got {pool!r}.")
        self.model = model
        self.pool = pool
        self.reads_images = model.main_input_name == "pixel_values"
        self.feature_dim = _width(model.config)

    def forward(self, inputs: Any) -> Tensor:
        """Return (batch, feature_dim) of a tokenizer's output, (batch, feature_dim, h, w) of images."""
        if self.reads_images:
            return self._maps(inputs)
        if not isinstance(inputs, Mapping):
            inputs = {"input_ids": inputs}
        states: Tensor = self.model(**inputs).last_hidden_state
        if self.pool == "first":
            return states[:, 0]
        mask = inputs.get("attention_mask")
        if mask is None:
            return states.mean(1)
        known = mask.unsqueeze(2).to(states)
        return (states * known).sum(1) / known.sum(1).clamp(min=1)

    def _maps(self, images: Tensor) -> Tensor:
        states: Tensor = self.model(pixel_values=images).last_hidden_state
        if states.dim() == 4:
            return states
        patch = getattr(self.model.config, "patch_size", None)
        if not isinstance(patch, int):
            return states
        height, width = (size // patch for size in images.shape[-2:])
        tokens = states[:, states.shape[1] - height * width :]
        return tokens.transpose(1, 2).unflatten(2, (height, width))


def hf_encoder(name: str, args: Mapping[str, Any]) -> EncoderInfo:
    """Return what is known of a model of transformers.

    Args:
        name: Its name on the hub, or a folder with its ``config.json``, and its weights if these are wanted.
        args: ``pool`` (see `HFEncoder`); ``length``, the number of tokens of a text that are
            read, 128 if not given; ``lora``, the rank of low-rank adapters, with
            peft's ``lora_alpha``, ``lora_dropout`` and ``target_modules``; anything else goes into the configuration.

    Raises:
        UsageError: transformers is not installed, or there is no such model.
    """
    config = _config(name, args)
    is_text = _reads_text(config)
    size = getattr(config, "image_size", 224)
    shape = (size, size) if isinstance(size, int) else tuple(size)
    length = _length(name, args, config)
    return EncoderInfo(
        build=partial(_build, name, dict(args)),
        feature_dim=_width(config),
        has_weights=True,
        image=None if is_text else _image_input(name, shape),
        tokenize=partial(_tokenize, name, length) if is_text else None,
    )


def _length(name: str, args: Mapping[str, Any], config: Any) -> int:
    """Return how many tokens of a text are read."""
    most = getattr(config, "max_position_embeddings", None) or 10**9
    length = args.get("length", min(128, most))
    if not isinstance(length, int) or not 1 <= length <= most:
        raise UsageError(
            f"length must be a number of tokens from 1 to {most}, which hf:{name} can read, got {length!r}."
        )
    return length


def _config(name: str, args: Mapping[str, Any]) -> Any:
    transformers = need("transformers", "hf", f"The encoder hf:{name}")
    folder = Path(name).expanduser()
    if (name.startswith((".", "/", "~")) or folder.exists()) and not (folder / "config.json").is_file():
        raise UsageError(f"hf:{name} must be a folder with a config.json, or a name on the hub.")
    rest = {key: value for key, value in args.items() if key not in ("pool", "length", "lora", *_LORA)}
    try:
        config = transformers.AutoConfig.from_pretrained(_place(name), local_files_only=_is_out_of_reach(name))
    except (OSError, ValueError) as error:
        if _is_out_of_reach(name) and not folder.is_dir():
            raise FastmtlError(
                f"hf:{name} is not among the models that have been downloaded, and Hugging Face's hub cannot be "
                "reached: give a folder with its config.json, as hf:./folder."
            ) from error
        raise FastmtlError(f"hf:{name} could not be found: {_first_line(error)}") from error
    for key, value in rest.items():
        if not hasattr(config, key):
            raise UsageError(f"hf:{name} has no setting {key!r} in its configuration.")
        setattr(config, key, value)
    return config


def _build(name: str, args: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    auto = need("transformers", "hf", f"The encoder hf:{name}").AutoModel
    config = _config(name, args)
    try:
        if pretrained:
            model = auto.from_pretrained(_place(name), config=config, local_files_only=_is_out_of_reach(name))
        else:
            model = auto.from_config(config)
    except (OSError, ValueError) as error:
        raise FastmtlError(f"The weights of hf:{name} could not be loaded: {_first_line(error)}") from error
    model = getattr(model, "encoder", model) if config.is_encoder_decoder else model
    if not pretrained:
        model = model.float()
    if args.get("lora"):
        model = _with_adapters(model, name, args)
    return HFEncoder(model, args.get("pool", "mean"))


def _with_adapters(model: Any, name: str, args: Mapping[str, Any]) -> Any:
    peft = need("peft", "hf", f"lora of the encoder hf:{name}")
    main_input = model.main_input_name
    settings = {key: args[key] for key in _LORA if key in args}
    settings.setdefault("target_modules", "all-linear")
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=int(args["lora"]), **settings))
    except (TypeError, ValueError) as error:
        raise UsageError(f"lora of hf:{name} cannot be as given: {_first_line(error)}") from error
    adapted.main_input_name = main_input
    return adapted


def _tokenize(name: str, length: int, texts: Sequence[Any]) -> dict[str, Tensor]:
    """Return the tokens of texts, padded to the longest of them."""
    encoded = _tokenizer(name)(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    return dict(encoded)


@cache
def _tokenizer(name: str) -> Any:
    transformers = need("transformers", "hf", f"The encoder hf:{name}")
    try:
        return transformers.AutoTokenizer.from_pretrained(_place(name), local_files_only=_is_out_of_reach(name))
    except (OSError, ValueError) as error:
        raise FastmtlError(f"The tokenizer of hf:{name} could not be loaded: {_first_line(error)}") from error


def _image_input(name: str, size: tuple[int, ...]) -> ImageInput:
    """Return how a model wants its images: as its preprocessor's settings say, as of ImageNet where it has none."""
    settings = _preprocessor(name)
    usual = ImageInput()
    # Pixels are from 0 to 1 here, and where they are normalised there they have been multiplied by this.
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255
    mean, std = settings.get("image_mean") or usual.mean, settings.get("image_std") or usual.std
    if not settings.get("do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    return ImageInput(
        size=(size[0], size[1]),
        mean=tuple(value / scale for value in mean),
        std=tuple(value / scale for value in std),
    )


def _preprocessor(name: str) -> dict[str, Any]:
    """Return the settings of a model's image processor, from its folder or the hub; none where it has none."""
    cached_file = need("transformers.utils", "hf", f"The encoder hf:{name}").cached_file
    try:
        for file in ("processor_config.json", "preprocessor_config.json"):
            path = cached_file(
                _place(name),
                file,
                local_files_only=_is_out_of_reach(name),
                _raise_exceptions_for_missing_entries=False,
            )
            content = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
            # Newer models have it as a part of a whole processor.
            settings = content.get("image_processor") if file.startswith("processor") else content
            if settings:
                return dict(settings)
    except (OSError, ValueError) as error:
        raise FastmtlError(f"How hf:{name} wants its images could not be read: {_first_line(error)}") from error
    return {}


def _reads_text(config: Any) -> bool:
    return getattr(config, "vocab_size", None) is not None and getattr(config, "num_channels", None) is None


def _width(config: Any) -> int:
    width = getattr(config, "hidden_size", None)
    if width is None:
        sizes = getattr(config, "hidden_sizes", None)
        width = sizes[-1] if sizes else getattr(config, "d_model", None)
    if not isinstance(width, int):
        raise UsageError(f"hf: {type(config).__name__} does not say how many features its model gives.")
    return width


def _place(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def _is_out_of_reach(name: str) -> bool:
    """Return whether only what has been downloaded can be had: transformers itself would try for half a minute."""
    return not Path(name).expanduser().is_dir() and not _answers(name, int(time.monotonic() / _KEEPS))


@cache
def _answers(name: str, now: int) -> bool:
    """Return whether the hub answers a question about a model, if only that there is none."""
    hub = need("huggingface_hub", "hf", f"The encoder hf:{name}")
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=_PATIENCE)
    except (hub.errors.HfHubHTTPError, ValueError):
        return True
    except Exception:
        # Whatever the network, a proxy or HF_HUB_OFFLINE raises.
        return False
    return True


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".") + "."
