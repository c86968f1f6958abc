"""NYUv2 in the folders LibMTL reads: an image, and maps of segmentation, depth and surface normals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fastmtl.errors import UsageError

__all__ = ["TASKS", "NYUv2", "RandomScaleCrop"]

Maps = tuple[Tensor, Tensor, Tensor, Tensor]
TASKS = ("segmentation", "depth", "normal")
_CHANNELS = {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}
_CLASSES = 13


class RandomScaleCrop:
    """Crop a random part and enlarge it to the full size; depths are divided by the scale.

    The source is the augmentation of PAD-Net (Xu et al., CVPR 2018), in the form LibMTL uses.

    Args:
        scale: Enlargements to choose from.
    """

    def __init__(self, scale: Sequence[float] = (1.0, 1.2, 1.5)) -> None:
        self.scale = tuple(scale)

    def __call__(self, image: Tensor, label: Tensor, depth: Tensor, normal: Tensor) -> Maps:
        """Return the four maps in their original sizes.

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
            enlarge(normal, "bilinear"),
        )


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def _flip(image: Tensor, label: Tensor, depth: Tensor, normal: Tensor) -> Maps:
    """Flip horizontally; the first component of normals changes its sign."""
    mirrored = normal.flip(-1) * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    return image.flip(-1), label.flip(-1), depth.flip(-1), mirrored


class NYUv2(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Rows ``(image, {"segmentation", "depth", "normal"})``, all float32.

    ``image`` is ``(3, h, w)``, ``segmentation`` ``(h, w)`` with -1 for pixels without label, ``depth`` ``(1, h, w)`` in
    metres with 0 for unknown, ``normal`` ``(3, h, w)`` with zeros for unknown.

    Args:
        root: Folder with ``train`` and ``val``, each with ``image``, ``label``, ``depth`` and ``normal``, in which the
            files are ``0.npy``, ``1.npy``, ...; of shape ``(h, w, channels)``, and ``(h, w)`` for ``label``.
        mode: ``"train"``; anything else reads ``val``, as in LibMTL.
        augmentation: Scale, cut and mirror each row at random.

    Raises:
        UsageError: A folder or a file is missing.
    """

    def __init__(self, root: str | Path, mode: str = "train", augmentation: bool = False) -> None:
        self.folder = Path(root).expanduser() / ("train" if mode == "train" else "val")
        self.augmentation = augmentation
        self._scale_crop = RandomScaleCrop()
        self._count = _count_rows(self.folder)

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
        files = [self._read(kind, index) for kind in _CHANNELS]
        for (kind, channels), values in zip(_CHANNELS.items(), files, strict=True):
            shape = (*files[0].shape[:2], *channels)
            if values.shape != shape:
                raise UsageError(f"{str(self._path(kind, index))!r} must have the shape {shape}, got {values.shape}.")
        image, label, depth, normal = map(_channels_first, files)
        if ((label < -1) | (label >= _CLASSES)).any():
            raise UsageError(
                f"{str(self._path('label', index))!r} must hold the classes 0 to {_CLASSES - 1}, and -1 for no label, "
                f"got values from {label.min():g} to {label.max():g}."
            )
        if self.augmentation:
            image, label, depth, normal = self._scale_crop(image, label, depth, normal)
            if _below(2):
                image, label, depth, normal = _flip(image, label, depth, normal)
        return image, {"segmentation": label, "depth": depth, "normal": normal}

    def _path(self, kind: str, index: int) -> Path:
        return self.folder / kind / f"{index}.npy"

    def _read(self, kind: str, index: int) -> np.ndarray:
        path = self._path(kind, index)
        try:
            return np.load(path).astype(np.float32)
        except (OSError, ValueError) as error:
            raise UsageError(f"{str(path)!r} cannot be read ({error}).") from error


def _channels_first(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, 2, 0) if values.ndim == 3 else values))


def _count_rows(folder: Path) -> int:
    for kind in _CHANNELS:
        if not (folder / kind).is_dir():
            raise UsageError(
                f"{str(folder.parent)!r} must hold train and val, each with image, label, depth and normal, but has no "
                f"{folder.name}/{kind}."
            )
    count = sum(path.suffix == ".npy" for path in (folder / "image").iterdir())
    if count == 0:
        raise UsageError(f"{str(folder / 'image')!r} holds no .npy files.")
    for kind in _CHANNELS:
        missing = next((i for i in range(count) if not (folder / kind / f"{i}.npy").is_file()), None)
        if missing is not None:
            raise UsageError(
                f"{str(folder)!r} has {count} images, which must be 0.npy to {count - 1}.npy in every folder, but "
                f"{kind}/{missing}.npy is missing."
            )
    return count
