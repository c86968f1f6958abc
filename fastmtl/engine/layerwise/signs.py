"""Random signs for sketches, drawn anew in every step, and their state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Signs"]

_BITS = 63


class Signs:
    """Draws tensors of random signs, the same in all processes that start from one seed.

    Args:
        device: Where the tensors are.
        seed: The seed.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self._shifts = torch.arange(_BITS, device=device)

    def draw(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return one tensor of entries 1 and -1 for each shape."""
        sizes = [math.prod(shape) for shape in shapes]
        total = sum(sizes)
        # Single random bits are cheaper than numbers.
        words = torch.empty(-(-total // _BITS), dtype=torch.int64, device=self._shifts.device)
        words.random_(generator=self.generator)
        bits = (words[:, None] >> self._shifts).bitwise_and_(1).flatten()[:total]
        signs = bits.to(dtype).mul_(2).sub_(1)
        return [part.view(shape) for part, shape in zip(signs.split(sizes), shapes, strict=True)]
