"""dual_cone as UPGrad calls it, one target per task, against the reference; the call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from fastmtl.benchmarks.ops._solver import normal, sizes, solver_case
from fastmtl.benchmarks.registry import Case
from torch import Tensor

__all__ = ["cases"]

_BOUND = 1e-12
_REG_EPS = 1e-4


def _conflicting(size: int, generator: torch.Generator) -> Tensor:
    # Few dimensions: nearly every task is in the way of another one.
    return normal(size, generator, size)


def _excess(gram: Tensor, targets: Tensor) -> Callable[[Tensor], float]:
    """Return a measure of weights: the largest |min(G v, v - u)| in units of s_i, which must be at most 1e-12."""
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
    for size in sizes(quick, most=64):
        targets = torch.eye(size, dtype=torch.float64, device=device) / size
        for kind, make in (("random", normal), ("conflicting", _conflicting)):
            jacobian = make(size, torch.Generator().manual_seed(size)).to(device)
            gram = jacobian @ jacobian.T
            gram = gram / gram.trace() + _REG_EPS * torch.eye(size, dtype=torch.float64, device=device)
            yield solver_case("dual_cone", f"{kind} T={size}", (gram, targets), _excess(gram, targets), _BOUND)
