"""upgrad against the reference, the call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastmtl.benchmarks.registry import Case, Variant
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]

_SIZES = (2, 3, 8, 16, 40, 64, 128)
_BOUND = 1e-9


def _distance(gram: Tensor, expected: Tensor) -> Callable[[Tensor], float]:
    """Return what measures weights: their distance from the reference's, a weight counted by its gradient's length."""
    length = gram.cpu().diagonal().sqrt()
    target = expected.cpu() * length

    def error(weights: Tensor) -> float:
        return float((weights.cpu() * length - target).norm() / target.norm())

    return error


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield Gram matrices of random gradients for all numbers of tasks."""
    reference = ops.implementation("upgrad", "reference")
    for size in (3, 16) if quick else _SIZES:
        generator = torch.Generator().manual_seed(size)
        jacobian = torch.randn(size, 1000, dtype=torch.float64, generator=generator).to(device)
        gram = jacobian @ jacobian.T
        yield Case(
            name=f"random T={size}",
            dtype="float64",
            variants={
                "fastmtl": Variant(call=partial(ops.upgrad, gram, 1e-4, 1e-4), allowed=_BOUND),
                "reference": Variant(call=partial(reference, gram, 1e-4, 1e-4), allowed=_BOUND),
            },
            error=_distance(gram, reference(gram, 1e-4, 1e-4)),
        )
