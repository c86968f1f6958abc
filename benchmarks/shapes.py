"""Shapes of the parameters gradients come from, and rows of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_matrix", "as_vector", "resnet18", "rows_of", "size_of"]


def resnet18(outputs: int = 10) -> list[tuple[int, ...]]:
    """Return the shapes of the 62 parameters of a ResNet-18 (He et al. 2016), 11.2 million elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            inputs = before if block == 0 else width
            shapes += [(width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if inputs != width:
                shapes += [(width, inputs, 1, 1), (width,), (width,)]
        before = width
    return [*shapes, (outputs, 512), (outputs,)]


def size_of(shapes: list[tuple[int, ...]]) -> int:
    """Return the number of elements."""
    return sum(math.prod(shape) for shape in shapes)


def rows_of(
    shapes: list[tuple[int, ...]], num_rows: int, device: torch.device, dtype: torch.dtype
) -> list[list[Tensor]]:
    """Return ``num_rows`` rows of normal gradients, each tensor with memory of its own."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes] for _ in range(num_rows)
    ]


def as_vector(row: Tensor | Sequence[Tensor]) -> Tensor:
    """Return a row (P,) in one piece."""
    return row if isinstance(row, Tensor) else torch.cat([tensor.flatten() for tensor in row])


def as_matrix(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return rows as one (T, P) tensor."""
    return torch.stack([as_vector(row) for row in rows])
