"""nash against the reference, from a cold start, the call included."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from fastmtl.benchmarks.ops.fairgrad import residual
from fastmtl.benchmarks.registry import Case, Variant

from fastmtl import ops

__all__ = ["cases"]

_SIZES = (2, 3, 8, 16, 40, 64, 128)
_BOUND = 1e-8


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield Gram matrices of normal gradients for all numbers of tasks."""
    reference = ops.implementation("nash", "reference")
    for size in (3, 16) if quick else _SIZES:
        jacobian = torch.randn(size, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        gram = (jacobian @ jacobian.T).to(device)
        yield Case(
            name=f"random T={size}",
            dtype="float64",
            variants={
                "fastmtl": Variant(call=partial(ops.nash, gram), allowed=_BOUND),
                "reference": Variant(call=partial(reference, gram), allowed=_BOUND),
            },
            error=residual(gram, 1.0),
        )
