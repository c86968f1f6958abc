"""What is known of an encoder before it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["EncoderInfo", "ImageInput"]


@dataclass(kw_only=True, slots=True, frozen=True)
class ImageInput:
    """How an encoder wants its images.

    Attributes:
        size: Height and width in pixels.
        mean, std: Of each channel of pixels from 0 to 1, to be normalised with.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass(kw_only=True, slots=True, frozen=True)
class EncoderInfo:
    """An encoder: ``build()`` creates it, its output has ``feature_dim`` channels.

    Attributes:
        build: Creates an encoder; ``build(pretrained=True)`` loads its weights if it ``has_weights``, and
            ``build(inputs=n)`` makes it for vectors of n numbers if it ``takes_vectors``.
        feature_dim: Channels of its output.
        has_weights: Whether it has weights to start from.
        image: How it wants images, where that is known.
        tokenize: Makes its inputs of texts, or of pairs of texts, for encoders of texts.
        takes_vectors: Whether it reads vectors.
        takes_facts: Whether it depends on the data: ``build(facts=facts)`` makes it, see `fastmtl.data.Splits`.
    """

    build: Callable[..., nn.Module]
    feature_dim: int
    has_weights: bool = False
    image: ImageInput | None = None
    tokenize: Callable[[Sequence[Any]], dict[str, Tensor]] | None = None
    takes_vectors: bool = False
    takes_facts: bool = False
