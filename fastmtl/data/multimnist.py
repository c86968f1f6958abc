"""MultiMNIST: two overlaid digits per image, tasks ``left`` and ``right``.

The recipe of Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_
(after Sabour et al.): on a canvas of 36 x 36 the left digit is at rows and columns 0 .. 27, the right one at 6 .. 33,
with the maximum where they overlap; the canvas is scaled to 28 x 28. A border of two black pixels makes it 32 x 32,
which a ResNet halves five times. The digits are split into train, val and test before they are paired, so that no digit
occurs in two splits. Accuracies with the package's 5,000 digits cannot be compared with published ones, with 60,000.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.data.digits import SPLITS, Digits
from fastmtl.data.tensors import GreyImages

__all__ = ["MEAN", "SIZE", "STD", "TASKS", "draw_pairs", "multimnist", "overlay"]

TASKS = ("left", "right")
_CANVAS, _SIZE, _RIGHT, _BORDER = 36, 28, 6, 2
# Height and width of the images.
SIZE = (_SIZE + 2 * _BORDER, _SIZE + 2 * _BORDER)
# Mean and standard deviation of MNIST's pixels, as the published code uses them.
MEAN, STD = 0.1307, 0.3081


def draw_pairs(count: int, digits: int, seed: tuple[int, ...]) -> Tensor:
    """Return ``(2, count)`` indices below ``digits``: which digit is left and which is right in each image."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, digits, (2, count)))


def overlay(left: Tensor, right: Tensor) -> Tensor:
    """Overlay two stacks of ``(n, 28, 28)`` uint8 digits into ``(n, 28, 28)`` uint8 images."""
    canvas = torch.zeros(len(left), 1, _CANVAS, _CANVAS, dtype=torch.uint8)
    canvas[:, 0, :_SIZE, :_SIZE] = left
    corner = canvas[:, 0, _RIGHT : _RIGHT + _SIZE, _RIGHT : _RIGHT + _SIZE]
    torch.maximum(corner, right, out=corner)
    scaled = F.interpolate(canvas, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False, antialias=True)
    return scaled[:, 0].contiguous()


def multimnist(
    digits: dict[str, Digits],
    counts: dict[str, int],
    *,
    right: dict[str, Digits] | None = None,
    seed: int = 0,
    stream: int = 0,
    max_shift: int = 0,
) -> dict[str, GreyImages]:
    """Return the splits as data sets of ``(3, 32, 32)`` float32 images with int64 labels ``left`` and ``right``.

    Args:
        digits: The source digits of each split.
        counts: How many images to make of each split.
        right: The source of the right digits, if it is another one.
        seed: Seed of the pairs, which are independent of the other splits and their counts.
        stream: Selects one of several independent sets of pairs per seed.
        max_shift: Random shift of the training images in pixels.
    """
    datasets = {}
    for number, split in enumerate(SPLITS):
        first, second = digits[split], (right or digits)[split]
        left, other = draw_pairs(counts[split], len(first.labels), (seed, stream, number))
        if right is not None:
            _, other = draw_pairs(counts[split], len(second.labels), (seed, stream, number, 1))
        datasets[split] = GreyImages(
            F.pad(overlay(first.images[left], second.images[other]), (_BORDER,) * 4),
            {"left": first.labels[left], "right": second.labels[other]},
            mean=MEAN,
            std=STD,
            max_shift=max_shift if split == "train" else 0,
        )
    return datasets
