"""dual_cone as UPGrad calls it, one target per task, against the reference; the call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastmtl.benchmarks.registry import Case, Variant
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]

_SIZES = (2, 3, 8, 16, 40, 64)
_BOUND = 1e-12
_REG_EPS = 1e-4


def _random(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, 1000, dtype=torch.float64, generator=generator)


def _conflicting(size: int, generator: torch.Generator) -> Tensor:
    # Few dimensions: nearly every task is in the way of another one.
    return torch.randn(size, size, dtype=torch.float64, generator=generator)


def _excess(gram: Tensor, targets: Tensor) -> Callable[[Tensor], float]:
    """Return what measures weights: the largest |min(G v, v - u)| in units of s_i, which must be at most 1e-12."""
    matrix, wanted = gram.cpu(), targets.cpu()
    length = matrix.diagonal().sqrt()

    def error(weights: Tensor) -> float:
        v = weights.cpu()
        if not bool((v >= wanted).all()):
            return float("inf")
        image = v @ matrix
        wrong = torch.where(v > wanted, image.abs(), -image)
        mass = (wanted.abs() + v - wanted) @ length
        return max(0.0, float((wrong / (mass[:, None] * length)).max()))

    return error


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield both kinds of Gram matrices, normalised and regularised as UPGrad does, for all numbers of tasks."""
    reference = ops.implementation("dual_cone", "reference")
    for size in (3, 16) if quick else _SIZES:
        targets = torch.eye(size, dtype=torch.float64, device=device) / size
        for make in (_random, _conflicting):
            jacobian = make(size, torch.Generator().manual_seed(size)).to(device)
            gram = jacobian @ jacobian.T
            gram = gram / gram.trace() + _REG_EPS * torch.eye(size, dtype=torch.float64, device=device)
            yield Case(
                name=f"{make.__name__[1:]} T={size}",
                dtype="float64",
                variants={
                    "fastmtl": Variant(call=partial(ops.dual_cone, gram, targets), allowed=_BOUND),
                    "reference": Variant(call=partial(reference, gram, targets), allowed=_BOUND),
                },
                error=_excess(gram, targets),
            )
