"""cagrad against the reference, the call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from fastmtl.benchmarks.ops._solver import normal, sizes, solver_case
from fastmtl.benchmarks.registry import Case
from torch import Tensor

__all__ = ["cases"]

_BOUND = 1e-8
_C = 0.5


def _conflicting(size: int, generator: torch.Generator) -> Tensor:
    # A common direction that every other task opposes.
    jacobian = 0.3 * normal(size, generator)
    common = torch.randn(1, 1000, dtype=torch.float64, generator=generator)
    return jacobian + common * (1 - 1.5 * (torch.arange(size) % 2))[:, None]


def _excess(gram: Tensor) -> Callable[[Tensor], float]:
    """Return a measure of weights: max_i (F(w) - <g_i, d>) / s_i."""
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
    for size in sizes(quick):
        for kind, make in (("random", normal), ("conflicting", _conflicting)):
            jacobian = make(size, torch.Generator().manual_seed(size))
            gram = (jacobian @ jacobian.T).to(device)
            yield solver_case("cagrad", f"{kind} T={size}, c={_C}", (gram, _C), _excess(gram), _BOUND)
