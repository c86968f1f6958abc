"""nash against the reference, from a cold start, the call included."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastmtl.benchmarks.ops._solver import normal, sizes, solver_case
from fastmtl.benchmarks.ops.fairgrad import residual
from fastmtl.benchmarks.registry import Case

__all__ = ["cases"]

_BOUND = 1e-8


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield Gram matrices of normal gradients for all numbers of tasks."""
    for size in sizes(quick):
        jacobian = normal(size, torch.Generator().manual_seed(size))
        gram = (jacobian @ jacobian.T).to(device)
        yield solver_case("nash", f"random T={size}", (gram,), residual(gram, 1.0), _BOUND)
