"""cagrad against the reference, the call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastmtl.benchmarks.registry import Case, Variant
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]

_SIZES = (2, 3, 8, 16, 40, 64, 128)
_BOUND = 1e-8
_C = 0.5


def _random(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, 1000, dtype=torch.float64, generator=generator)


def _conflicting(size: int, generator: torch.Generator) -> Tensor:
    # A common direction that every other task opposes.
    jacobian = 0.3 * torch.randn(size, 1000, dtype=torch.float64, generator=generator)
    common = torch.randn(1, 1000, dtype=torch.float64, generator=generator)
    return jacobian + common * (1 - 1.5 * (torch.arange(size) % 2))[:, None]


def _excess(gram: Tensor) -> Callable[[Tensor], float]:
    """Return what measures weights: max_i (F(w) - <g_i, d>) / s_i."""
    matrix = gram.cpu()
    length = matrix.diagonal().sqrt()
    mean = matrix.mean(dim=1)
    norm = mean.mean().sqrt()

    def error(weights: Tensor) -> float:
        w = weights.cpu()
        image = matrix @ w
        root = (w @ image).sqrt()
        value = w @ mean + _C * norm * root
        below = value - mean - _C * norm / root * image
        return max(0.0, float((below / ((1 + _C) * norm * (length + w @ length))).max()))

    return error


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield both kinds of Gram matrices for all numbers of tasks."""
    reference = ops.implementation("cagrad", "reference")
    for size in (3, 16) if quick else _SIZES:
        for make in (_random, _conflicting):
            jacobian = make(size, torch.Generator().manual_seed(size))
            gram = (jacobian @ jacobian.T).to(device)
            yield Case(
                name=f"{make.__name__[1:]} T={size}, c={_C}",
                dtype="float64",
                variants={
                    "fastmtl": Variant(call=partial(ops.cagrad, gram, _C), allowed=_BOUND),
                    "reference": Variant(call=partial(reference, gram, _C), allowed=_BOUND),
                },
                error=_excess(gram),
            )
