"""fairgrad against the reference, from a cold start, the call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastmtl.benchmarks.registry import Case, Variant
from torch import Tensor

from fastmtl import ops

__all__ = ["cases", "residual"]

_SIZES = (2, 3, 8, 16, 40, 64, 128)
_BOUND = 1e-8


def residual(gram: Tensor, alpha: float) -> Callable[[Tensor], float]:
    """Return what measures weights: max_i |(G w)_i w_i^(1/alpha) - 1|."""
    matrix = gram.cpu()
    matrix = matrix + 1e-10 * matrix.diagonal().diag()

    def error(weights: Tensor) -> float:
        w = weights.cpu()
        return float(((matrix @ w) * w ** (1 / alpha) - 1).abs().max())

    return error


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield Gram matrices of normal gradients for all numbers of tasks."""
    reference = ops.implementation("fairgrad", "reference")
    for size in (3, 16) if quick else _SIZES:
        jacobian = torch.randn(size, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        gram = (jacobian @ jacobian.T).to(device)
        yield Case(
            name=f"random T={size}, alpha=2",
            dtype="float64",
            variants={
                "fastmtl": Variant(call=partial(ops.fairgrad, gram, 2.0), allowed=_BOUND),
                "reference": Variant(call=partial(reference, gram, 2.0), allowed=_BOUND),
            },
            error=residual(gram, 2.0),
        )
