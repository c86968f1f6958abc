"""fairgrad against the reference, from a cold start, the call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from fastmtl.benchmarks.ops._solver import normal, sizes, solver_case
from fastmtl.benchmarks.registry import Case
from torch import Tensor

__all__ = ["cases", "residual"]

_BOUND = 1e-8


def residual(gram: Tensor, alpha: float) -> Callable[[Tensor], float]:
    """Return a measure of weights: max_i |(G w)_i w_i^(1/alpha) - 1|."""
    matrix = gram.cpu()
    matrix = matrix + 1e-10 * matrix.diagonal().diag()

    def error(weights: Tensor) -> float:
        w = weights.cpu()
        return float(((matrix @ w) * w ** (1 / alpha) - 1).abs().max())

    return error


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield Gram matrices of normal gradients for all numbers of tasks."""
    for size in sizes(quick):
        jacobian = normal(size, torch.Generator().manual_seed(size))
        gram = (jacobian @ jacobian.T).to(device)
        yield solver_case("fairgrad", f"random T={size}, alpha=2", (gram, 2.0), residual(gram, 2.0), _BOUND)
