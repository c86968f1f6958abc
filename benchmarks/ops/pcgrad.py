"""pcgrad against the reference, over a random permutation of all tasks per task, the call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from fastmtl.benchmarks.ops._solver import normal, sizes, solver_case
from fastmtl.benchmarks.registry import Case
from torch import Tensor

__all__ = ["cases"]

_BOUND = 1e-12


def _conflicting(size: int, generator: torch.Generator) -> Tensor:
    # Fewer dimensions than tasks: many projections, and products that they change much.
    return normal(size, generator, max(2, size // 2))


def _excess(jacobian: Tensor, orders: Tensor) -> Callable[[Tensor], float]:
    """Return a measure of weights: the distance to the update of the algorithm on the rows, over sum_i |g_i|."""
    rows = jacobian.cpu()
    update = torch.zeros_like(rows[0])
    for projected, order in zip(rows.clone(), orders.tolist(), strict=True):
        for j in order:
            product = projected @ rows[j]
            if product < 0:
                projected -= product / (rows[j] @ rows[j]) * rows[j]
        update += projected
    unit = rows.norm(dim=1).sum()

    def error(weights: Tensor) -> float:
        return float((weights.cpu() @ rows - update).norm() / unit)

    return error


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield both kinds of Gram matrices for all numbers of tasks."""
    for size in sizes(quick):
        for kind, make in (("random", normal), ("conflicting", _conflicting)):
            generator = torch.Generator().manual_seed(size)
            jacobian = make(size, generator).to(device)
            orders = torch.rand(size, size, generator=generator).argsort(dim=1).to(device)
            gram = jacobian @ jacobian.T
            yield solver_case("pcgrad", f"{kind} T={size}", (gram, orders), _excess(jacobian, orders), _BOUND)
