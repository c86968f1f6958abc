"""pcgrad against the reference, over a random permutation of all tasks per task, the call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastmtl.benchmarks.registry import Case, Variant
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]

_SIZES = (2, 3, 8, 16, 40, 64, 128)
_BOUND = 1e-12


def _random(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, 1000, dtype=torch.float64, generator=generator)


def _conflicting(size: int, generator: torch.Generator) -> Tensor:
    # Fewer dimensions than tasks: many projections, and products that they change much.
    return torch.randn(size, max(2, size // 2), dtype=torch.float64, generator=generator)


def _excess(jacobian: Tensor, orders: Tensor) -> Callable[[Tensor], float]:
    """Return what measures weights: the distance to the update of the algorithm on the rows, over sum_i |g_i|."""
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
    reference = ops.implementation("pcgrad", "reference")
    for size in (3, 16) if quick else _SIZES:
        for make in (_random, _conflicting):
            generator = torch.Generator().manual_seed(size)
            jacobian = make(size, generator).to(device)
            orders = torch.rand(size, size, generator=generator).argsort(dim=1).to(device)
            gram = jacobian @ jacobian.T
            yield Case(
                name=f"{make.__name__[1:]} T={size}",
                dtype="float64",
                variants={
                    "fastmtl": Variant(call=partial(ops.pcgrad, gram, orders), allowed=_BOUND),
                    "reference": Variant(call=partial(reference, gram, orders), allowed=_BOUND),
                },
                error=_excess(jacobian, orders),
            )
