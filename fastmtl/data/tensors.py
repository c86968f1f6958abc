"""Data sets of tensors in memory that hand out whole batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmtl.errors import UsageError

__all__ = ["GreyImages", "Tensors", "as_is", "batch_loader", "row_loader"]

Row = TypeVar("Row")

Labels = Tensor | dict[str, Tensor]


class Tensors(Dataset[tuple[Tensor, Labels]]):
    """Rows in memory; a batch is one vectorised fetch.

    ``__getitems__`` returns ``(inputs, labels)`` already batched, so the loader must not collate (``batch_loader`` sees
    to that). Inputs are ``(n, ...)``, labels ``(n,)`` or one such tensor per task.
    """

    def __init__(self, inputs: Tensor, labels: Labels) -> None:
        self.inputs = inputs
        self.labels = labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Labels]:
        """Return the inputs of one row and its label or labels."""
        inputs, labels = self.__getitems__([index])
        return inputs[0], labels[0] if isinstance(labels, Tensor) else {task: y[0] for task, y in labels.items()}

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Labels]:
        """Return ``(b, ...)`` inputs and ``(b,)`` labels."""
        rows = torch.as_tensor(indices)
        if isinstance(self.labels, Tensor):
            return self.inputs[rows], self.labels[rows]
        return self.inputs[rows], {task: y[rows] for task, y in self.labels.items()}


class GreyImages(Tensors):
    """Grey images kept as ``(n, h, w)`` uint8, given out as float32, normalised and repeated to three channels.

    Args:
        images, labels: As of `Tensors`.
        mean: Mean of the pixels, of 0 .. 1.
        std: Standard deviation of the pixels.
        max_shift: Move each image by up to so many pixels in both directions, anew each time; 0 for not at all.
    """

    def __init__(self, images: Tensor, labels: Labels, *, mean: float, std: float, max_shift: int = 0) -> None:
        super().__init__(images, labels)
        self.images = images
        self.max_shift = max_shift
        self._scale = 1 / (255 * std)
        self._offset = -mean / std

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Labels]:
        """Return ``(b, 3, h, w)`` float32, one channel expanded, and ``(b,)`` labels."""
        images, labels = super().__getitems__(indices)
        if self.max_shift:
            images = _shift(images, self.max_shift)
        return images.float().mul_(self._scale).add_(self._offset).unsqueeze(1).expand(-1, 3, -1, -1), labels


def _shift(images: Tensor, most: int) -> Tensor:
    """Move each of ``(b, h, w)`` images by its own random offset, black coming in at the edges."""
    batch, height, width = images.shape
    padded = F.pad(images, (most, most, most, most))
    down, right = torch.randint(0, 2 * most + 1, (2, batch, 1))
    rows = (down + torch.arange(height)).unsqueeze(2)
    columns = (right + torch.arange(width)).unsqueeze(1)
    return padded[torch.arange(batch).view(-1, 1, 1), rows, columns]


def as_is(batch: list[Row]) -> list[Row]:
    """Collate nothing: the batches of a data set whose ``__getitems__`` returns whole ones."""
    return batch


def row_loader(
    dataset: Dataset[Row],
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    collate_fn: Callable[[list[Row]], object] | None = None,
) -> DataLoader[Row]:
    """Return a loader over a data set of rows, collated as torch does unless ``collate_fn`` says otherwise.

    With ``shuffle`` the order is drawn from ``seed`` and a last incomplete batch is dropped; without, all rows come in
    order.

    Raises:
        UsageError: ``batch_size`` is below 1, or no whole batch can be had.
    """
    rows = len(dataset)  # type: ignore[arg-type]
    if batch_size < 1 or rows == 0 or (shuffle and batch_size > rows):
        raise UsageError(f"batch_size must be between 1 and the {rows} rows of the data set, got {batch_size}.")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=shuffle,
        collate_fn=collate_fn,
        generator=torch.Generator().manual_seed(seed),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


# The loader over a data set whose ``__getitems__`` returns whole batches.
batch_loader = partial(row_loader, collate_fn=as_is)
