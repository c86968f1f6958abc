"""Images from files, bytes and rows of columns, as tensors."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["IMAGE_SUFFIXES", "as_image", "is_image", "open_image", "to_map", "to_tensor"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".npy")


def is_image(value: Any, folder: Path | None = None) -> bool:
    """Return whether a column's value is an image: of PIL, its bytes, or the path of a file."""
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    if isinstance(value, str):
        return value.lower().endswith(IMAGE_SUFFIXES) and ((folder or Path()) / value).is_file()
    return isinstance(value, bytes) or any(kind.__module__.startswith("PIL.") for kind in type(value).__mro__)


def open_image(path: Path) -> Any:
    """Return the PIL image of a file, or the array (h, w, channels) of a .npy.

    Raises:
        UsageError: It is missing or cannot be decoded.
    """
    from PIL import Image

    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError) as error:
        raise UsageError(f"The image {str(path)!r} cannot be read ({error}).") from error


def as_image(value: Any, folder: Path | None = None) -> Any:
    """Return the PIL image of a column's value.

    Raises:
        UsageError: It is none.
    """
    from PIL import Image

    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, str):
        return open_image((folder or Path()) / value)
    if isinstance(value, bytes):
        try:
            return Image.open(io.BytesIO(value))
        except OSError as error:
            raise UsageError(f"An image cannot be decoded ({error}).") from error
    if not hasattr(value, "convert"):
        raise UsageError(f"An image must be a PIL image, bytes or a path, got a {type(value).__name__}.")
    return value


def to_tensor(
    image: Any, size: Sequence[int], mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)
) -> Tensor:
    """Return a PIL image as (channels, *size) float32, pixels from 0 to 1 normalised by channel; grey with one mean.

    It is resized with antialiasing. An array (h, w, channels) is an image too, of numbers from 0 to 1 or of bytes.

    Raises:
        UsageError: An array has another shape.
    """
    from PIL import Image

    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = Image.fromarray(image)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != len(mean):
            raise UsageError(f"An image must be (height, width, {len(mean)}) numbers, got {image.shape}.")
        whole = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
        if whole.shape[-2:] != tuple(size):
            whole = F.interpolate(whole[None], tuple(size), mode="bilinear", antialias=True)[0]
        return (whole - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    image = as_image(image).convert("RGB" if len(mean) == 3 else "L")
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    pixels = pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels[None]
    shape = (-1, 1, 1)
    return ((pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)).contiguous()


def to_map(value: Any, size: Sequence[int], channels: int, folder: Path | None = None) -> Tensor:
    """Return a map as (channels, *size) float32, (*size) for no channels, of the nearest pixels.

    Args:
        value: (h, w) or (h, w, channels) numbers, or an image with a number per pixel.
        size: Height and width.
        channels: Number of channels, 0 for class numbers.
        folder: Where paths begin.

    Raises:
        UsageError: It has another shape.
    """
    if is_image(value, folder):
        value = np.asarray(as_image(value, folder))
    values = torch.as_tensor(np.asarray(value, dtype=np.float32))
    wanted = 3 if channels > 1 else 2
    if values.dim() == 3 and values.shape[-1] == 1 and channels < 2:
        values = values[..., 0]
    if values.dim() != wanted or (channels > 1 and values.shape[-1] != channels):
        raise UsageError(f"A map must be (height, width{', ' + str(channels) if channels > 1 else ''}) numbers.")
    stacked = values.permute(2, 0, 1) if values.dim() == 3 else values[None]
    resized = F.interpolate(stacked[None], tuple(size), mode="nearest")[0]
    return resized if channels else resized[0]
