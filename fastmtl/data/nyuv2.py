"""NYUv2 and Cityscapes in the folders LibMTL reads: an image, and maps of segmentation, depth and surface normals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fastmtl.errors import UsageError

__all__ = ["TASKS", "Cityscapes", "NYUv2", "RandomScaleCrop"]

TASKS = ("segmentation", "depth", "normal")


class RandomScaleCrop:
    """Crop a random part and enlarge it to the full size; depths are divided by the scale.

    The source is the augmentation of PAD-Net (Xu et al., CVPR 2018), in the form LibMTL uses.

    Args:
        scale: Enlargements to choose from.
    """

    def __init__(self, scale: Sequence[float] = (1.0, 1.2, 1.5)) -> None:
        self.scale = tuple(scale)

    def __call__(self, image: Tensor, label: Tensor, depth: Tensor, *normal: Tensor) -> tuple[Tensor, ...]:
        """Return the maps in their original sizes; there may be no normals.

        ``image`` and ``normal`` ``(3, h, w)`` are interpolated bilinearly, normals neither rotated nor normalised;
        ``label`` ``(h, w)``, floating point, and ``depth`` ``(1, h, w)`` take the nearest pixel.
        """
        height, width = image.shape[-2:]
        scale = self.scale[_below(len(self.scale))]
        h, w = int(height / scale), int(width / scale)
        top, left = _below(height - h + 1), _below(width - w + 1)

        def enlarge(maps: Tensor, mode: str) -> Tensor:
            part = maps[None, :, top : top + h, left : left + w]
            corners = True if mode == "bilinear" else None
            return F.interpolate(part, size=(height, width), mode=mode, align_corners=corners)[0]

        return (
            enlarge(image, "bilinear"),
            enlarge(label[None], "nearest")[0],
            enlarge(depth, "nearest") / scale,
            *(enlarge(part, "bilinear") for part in normal),
        )


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def _flip(image: Tensor, label: Tensor, depth: Tensor, *normal: Tensor) -> tuple[Tensor, ...]:
    """Flip horizontally; the first component of normals changes its sign."""
    signs = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    return image.flip(-1), label.flip(-1), depth.flip(-1), *(part.flip(-1) * signs for part in normal)


class _Maps(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Rows of an image and maps, from folders of .npy files.

    Attributes:
        channels: Kind of map to its channels; the folder has the kind's name.
        classes: Number of classes of ``label``.
        other_names: Kind of map to another name that its folder may have.
    """

    channels: ClassVar[Mapping[str, tuple[int, ...]]]
    classes: ClassVar[int]
    other_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, root: str | Path, mode: str = "train", augmentation: bool = False) -> None:
        self.folder = Path(root).expanduser() / ("train" if mode == "train" else "val")
        self.augmentation = augmentation
        self._scale_crop = RandomScaleCrop()
        self._names = {kind: kind for kind in self.channels}
        for kind, other in self.other_names.items():
            if not (self.folder / kind).is_dir() and (self.folder / other).is_dir():
                self._names[kind] = other
        self._count = _count_rows(self.folder, list(self._names.values()))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one row.

        Raises:
            IndexError: There is no such row.
            UsageError: A file cannot be read, has another size than the image, or invalid classes.
        """
        if not 0 <= index < self._count:
            raise IndexError(index)
        files = [self._read(kind, index) for kind in self.channels]
        for (kind, channels), values in zip(self.channels.items(), files, strict=True):
            shape = (*files[0].shape[:2], *channels)
            if values.shape != shape:
                raise UsageError(f"{str(self._path(kind, index))!r} must have the shape {shape}, got {values.shape}.")
        maps = tuple(map(_channels_first, files))
        label = maps[1]
        if ((label < -1) | (label >= self.classes)).any():
            raise UsageError(
                f"{str(self._path('label', index))!r} must hold the classes 0 to {self.classes - 1}, and -1 for no "
                f"label, got values from {label.min():g} to {label.max():g}."
            )
        if self.augmentation:
            maps = self._scale_crop(*maps)
            if _below(2):
                maps = _flip(*maps)
        return maps[0], dict(zip(TASKS, maps[1:], strict=False))

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / self._names[kind] / f"{index}.npy"

    def _read(self, kind: str, index: int) -> np.ndarray:
        path = self._path(kind, index)
        try:
            return np.load(path).astype(np.float32)
        except (OSError, ValueError) as error:
            raise UsageError(f"{str(path)!r} cannot be read ({error}).") from error


class NYUv2(_Maps):
    """Rows ``(image, {"segmentation", "depth", "normal"})``, all float32.

    ``image`` is ``(3, h, w)``, ``segmentation`` ``(h, w)`` of 13 classes with -1 for pixels without label, ``depth``
    ``(1, h, w)`` in metres with 0 for unknown, ``normal`` ``(3, h, w)`` with zeros for unknown.

    Args:
        root: Folder with ``train`` and ``val``, each with ``image``, ``label``, ``depth`` and ``normal``, in which the
            files are ``0.npy``, ``1.npy``, ...; of shape ``(h, w, channels)``, and ``(h, w)`` for ``label``.
        mode: ``"train"``; anything else reads ``val``, as in LibMTL.
        augmentation: Scale, cut and mirror each row at random.

    Raises:
        UsageError: A folder or a file is missing.
    """

    channels: ClassVar = {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}
    classes = 13


class Cityscapes(_Maps):
    """Rows ``(image, {"segmentation", "depth"})`` of street scenes, all float32, as `NYUv2` has them.

    ``segmentation`` has 7 classes, ``depth`` is the inverse depth (disparity).

    Args:
        root: Folder with ``train`` and ``val``, each with ``image``, ``label`` (or ``label_7``, as MTAN's authors have
            it) and ``depth``, with files as of `NYUv2`.
        mode: ``"train"``; anything else reads ``val``.
        augmentation: Scale, cut and mirror each row at random.

    Raises:
        UsageError: A folder or a file is missing.
    """

    channels: ClassVar = {"image": (3,), "label": (), "depth": (1,)}
    classes = 7
    other_names: ClassVar = {"label": "label_7"}


def _channels_first(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, 2, 0) if values.ndim == 3 else values))


def _count_rows(folder: Path, kinds: Sequence[str]) -> int:
    for kind in kinds:
        if not (folder / kind).is_dir():
            *others, last = kinds
            raise UsageError(
                f"{str(folder.parent)!r} must hold train and val, each with {', '.join(others)} and {last}, but has no "
                f"{folder.name}/{kind}."
            )
    count = sum(path.suffix == ".npy" for path in (folder / "image").iterdir())
    if count == 0:
        raise UsageError(f"{str(folder / 'image')!r} holds no .npy files.")
    for kind in kinds:
        missing = next((i for i in range(count) if not (folder / kind / f"{i}.npy").is_file()), None)
        if missing is not None:
            raise UsageError(
                f"{str(folder)!r} has {count} images, which must be 0.npy to {count - 1}.npy in every folder, but "
                f"{kind}/{missing}.npy is missing."
            )
    return count
