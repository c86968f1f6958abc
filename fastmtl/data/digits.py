"""Handwritten digits: 5,000 of MNIST in the package, or a whole MNIST-like data set from a folder."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["SPLITS", "Digits", "embedded_digits", "folder_digits"]

SPLITS = ("train", "val", "test")
_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# The last rows of the training files become the validation split.
_VAL_ROWS = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Grey images ``(n, 28, 28)`` uint8 and their classes 0 .. 9 ``(n,)`` int64."""

    images: Tensor
    labels: Tensor


def embedded_digits() -> dict[str, Digits]:
    """Return the digits in the package: 4,000 / 500 / 500 for train / val / test, each class equally often."""
    with files("fastmtl.data").joinpath("mnist5k.npz").open("rb") as file, np.load(file) as arrays:
        return {
            split: Digits(
                images=torch.from_numpy(arrays[f"{split}_images"]),
                labels=torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64)),
            )
            for split in SPLITS
        }


def folder_digits(folder: str | Path) -> dict[str, Digits]:
    """Return the digits of a folder with MNIST's four IDX files, plain or ``.gz`` (MNIST, Fashion-MNIST, KMNIST).

    The last 5,000 images of the training file are the validation split.

    Raises:
        UsageError: The folder or a file is missing, or a file is not in IDX format.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UsageError(f"The data folder {str(folder)!r} does not exist.")
    images, labels = {}, {}
    for split, (image_file, label_file) in _IDX_FILES.items():
        images[split] = _read_idx(folder, image_file, ndim=3)
        labels[split] = _read_idx(folder, label_file, ndim=1).long()
        if images[split].shape != (len(labels[split]), 28, 28):
            raise UsageError(
                f"{image_file} in {str(folder)!r} must hold one 28 x 28 image per label, "
                f"got images of shape {tuple(images[split].shape)} and {len(labels[split])} labels."
            )
    if len(labels["train"]) <= _VAL_ROWS:
        raise UsageError(f"{str(folder)!r} needs more than {_VAL_ROWS} training images, got {len(labels['train'])}.")
    return {
        "train": Digits(images=images["train"][:-_VAL_ROWS], labels=labels["train"][:-_VAL_ROWS]),
        "val": Digits(images=images["train"][-_VAL_ROWS:], labels=labels["train"][-_VAL_ROWS:]),
        "test": Digits(images=images["test"], labels=labels["test"]),
    }


def _read_idx(folder: Path, name: str, ndim: int) -> Tensor:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise UsageError(f"The data folder {str(folder)!r} has no file {name} or {name}.gz.")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UsageError(f"{str(path)!r} cannot be read ({error}).") from error
    shape = np.frombuffer(raw, dtype=">i4", count=ndim, offset=4) if len(raw) >= 4 + 4 * ndim else np.array([-1])
    # The magic number: two zero bytes, 8 for unsigned bytes, the number of dimensions.
    if raw[:4] != bytes((0, 0, 8, ndim)) or len(raw) - 4 - 4 * ndim != int(np.prod(shape, dtype=np.int64)):
        raise UsageError(f"{str(path)!r} is not a whole IDX file of unsigned bytes with {ndim} dimensions.")
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * ndim).reshape(tuple(shape)).copy()
    return torch.from_numpy(values)
