"""min_norm against the reference and a plain Frank-Wolfe loop, from a cold start, the call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastmtl.benchmarks.ops._solver import normal, sizes, solver_case
from fastmtl.benchmarks.registry import Case, Variant
from torch import Tensor

__all__ = ["cases"]

_BOUND = 1e-12
_ITERATIONS = 250


def _conflicting(size: int, generator: torch.Generator) -> Tensor:
    # Fewer dimensions than tasks want and lengths that differ: only some tasks get weight.
    jacobian = normal(size, generator, size)
    return jacobian * torch.logspace(-1, 1, size, dtype=torch.float64)[:, None]


def _excess(gram: Tensor) -> Callable[[Tensor], float]:
    """Return a measure of weights: max_i ((1 - 1e-6) w^T G w - (G w)_i) / s_i, which must be at most 1e-12."""
    matrix = gram.cpu()
    length = matrix.diagonal().sqrt()

    def error(weights: Tensor) -> float:
        w = weights.cpu()
        image = matrix @ w
        below = (1 - 1e-6) * (w @ image) - image
        return max(0.0, float((below / (length * (length @ w))).max()))

    return error


def _frank_wolfe(gram: Tensor) -> Tensor:
    """Return the weights after the number of steps that MGDA's first implementation takes, without its host syncs."""
    size = len(gram)
    weights = torch.full((size,), 1 / size, dtype=gram.dtype, device=gram.device)
    vertices = torch.eye(size, dtype=gram.dtype, device=gram.device)
    for _ in range(_ITERATIONS):
        image = gram @ weights
        vertex = image.argmin(keepdim=True)
        square = weights @ image
        gap = square - image[vertex]
        curvature = square - 2 * image[vertex] + gram.diagonal()[vertex]
        step = (gap / curvature.clamp(min=1e-300)).clamp(0, 1)
        weights = weights + step * (vertices[vertex[0]] - weights)
    return weights


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield both kinds of Gram matrices for all numbers of tasks."""
    for size in sizes(quick):
        for kind, make in (("random", normal), ("conflicting", _conflicting)):
            jacobian = make(size, torch.Generator().manual_seed(size)).to(device)
            gram = jacobian @ jacobian.T
            # It stops far from the minimum; its error says how far.
            frank_wolfe = Variant(call=partial(_frank_wolfe, gram), allowed=float("inf"))
            others = {f"Frank-Wolfe x {_ITERATIONS}": frank_wolfe}
            yield solver_case("min_norm", f"{kind} T={size}", (gram,), _excess(gram), _BOUND, others)
