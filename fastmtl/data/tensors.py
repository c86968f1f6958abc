"""Data sets of tensors in memory that return whole batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastmtl.errors import UsageError

__all__ = ["GreyImages", "Tensors", "as_is", "batch_loader", "row_loader"]

Row = TypeVar("Row")

Labels = Tensor | dict[str, Tensor]


class Tensors(Dataset[tuple[Tensor, Labels]]):
    """Rows in memory; a batch is one vectorised fetch.

    ``__getitems__`` returns batched ``(inputs, labels)``, so the loader must not collate: see ``batch_loader``. Inputs
    are ``(n, ...)``, labels ``(n,)`` or one such tensor per task.
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
    """Grey images stored as ``(n, h, w)`` uint8, returned as float32, normalised and expanded to three channels.

    Args:
        images, labels: As of `Tensors`.
        mean: Mean of the pixels, from 0 to 1.
        std: Standard deviation of the pixels.
        max_shift: Shift each image at random by up to this number of pixels in both directions.
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
    """Shift each of the ``(b, h, w)`` images by a random offset, with black at the edges."""
    batch, height, width = images.shape
    padded = F.pad(images, (most, most, most, most))
    down, right = torch.randint(0, 2 * most + 1, (2, batch, 1))
    rows = (down + torch.arange(height)).unsqueeze(2)
    columns = (right + torch.arange(width)).unsqueeze(1)
    return padded[torch.arange(batch).view(-1, 1, 1), rows, columns]


def as_is(batch: list[Row]) -> list[Row]:
    """Return a batch unchanged: ``collate_fn`` for data sets whose ``__getitems__`` returns whole batches."""
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
    sampler: Sampler[int] | None = None,
) -> DataLoader[Row]:
    """Return a loader over a data set of rows, with torch's collation if ``collate_fn`` is None.

    With ``shuffle`` the order is drawn from ``seed`` and the last incomplete batch is dropped. A ``sampler`` takes the
    place of both; what it draws by is its ``generator``.

    Raises:
        UsageError: ``batch_size`` is below 1, or greater than the number of rows with ``shuffle`` or ``sampler``.
    """
    rows = len(dataset if sampler is None else sampler)  # type: ignore[arg-type]
    drops = shuffle or sampler is not None
    if batch_size < 1 or rows == 0 or (drops and batch_size > rows):
        raise UsageError(f"batch_size must be between 1 and the {rows} rows of the data set, got {batch_size}.")
    generator = getattr(sampler, "generator", None)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle if sampler is None else None,
        sampler=sampler,
        drop_last=drops,
        collate_fn=collate_fn,
        # Checkpoints hold the state of the loader's generator, which draws the order of the rows.
        generator=torch.Generator().manual_seed(seed) if generator is None else generator,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


# The loader over a data set whose ``__getitems__`` returns whole batches.
batch_loader = partial(row_loader, collate_fn=as_is)
