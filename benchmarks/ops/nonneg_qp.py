"""nonneg_qp against the reference, the call included."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from fastmtl.benchmarks.registry import Case, Variant
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]

_SIZES = (2, 3, 8, 16, 40, 64, 128)
_BOUND = 1e-9


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield Gram matrices of random gradients and right sides they reach, for all numbers of tasks."""
    reference = ops.implementation("nonneg_qp", "reference")
    for size in (3, 16) if quick else _SIZES:
        generator = torch.Generator().manual_seed(size)
        jacobian = torch.randn(size, 1000, dtype=torch.float64, generator=generator).to(device)
        target = torch.randn(1000, dtype=torch.float64, generator=generator).to(device)
        gram, linear = jacobian @ jacobian.T, jacobian @ target
        expected = reference(gram, linear).cpu()

        def error(solution: Tensor, expected: Tensor = expected) -> float:
            return float((solution.cpu() - expected).norm() / expected.norm())

        yield Case(
            name=f"random T={size}",
            dtype="float64",
            variants={
                "fastmtl": Variant(call=partial(ops.nonneg_qp, gram, linear), allowed=_BOUND),
                "reference": Variant(call=partial(reference, gram, linear), allowed=_BOUND),
            },
            error=error,
        )
