"""nonneg_qp against the reference, the call included."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastmtl.benchmarks.ops._solver import normal, sizes, solver_case
from fastmtl.benchmarks.registry import Case
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]

_BOUND = 1e-9


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield Gram matrices of random gradients and right sides they reach, for all numbers of tasks."""
    for size in sizes(quick):
        generator = torch.Generator().manual_seed(size)
        jacobian = normal(size, generator).to(device)
        target = torch.randn(1000, dtype=torch.float64, generator=generator).to(device)
        gram, linear = jacobian @ jacobian.T, jacobian @ target
        expected = ops.implementation("nonneg_qp", "reference")(gram, linear).cpu()

        def error(solution: Tensor, expected: Tensor = expected) -> float:
            return float((solution.cpu() - expected).norm() / expected.norm())

        yield solver_case("nonneg_qp", f"random T={size}", (gram, linear), error, _BOUND)
