"""gradvac against the reference, for one group of parameters and for one per tensor of a ResNet-18, call included."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from fastmtl.benchmarks.ops._solver import sizes, solver_case
from fastmtl.benchmarks.registry import Case
from torch import Tensor

__all__ = ["cases"]

_TENSORS = 62
_BOUND = 1e-11

Result = tuple[Tensor, Tensor]


def _on_rows(rows: Tensor, orders: Tensor, rho: Tensor, beta: float) -> tuple[Tensor, Tensor, float]:
    """Return the update, the new averages and the sum of the vectors' lengths from the algorithm on the rows."""
    average = rho.tolist()
    length = rows.norm(dim=1).tolist()
    vectors = rows.clone()
    for i, order in enumerate(orders.tolist()):
        p = vectors[i]
        for j in order:
            if j == i:
                continue
            norm, target = float(p.norm()), average[i][j]
            cosine = float(p @ rows[j]) / (norm * length[j])
            if cosine < target:
                sine = (1 - target**2) ** 0.5
                p += norm * (target * (1 - cosine**2) ** 0.5 - cosine * sine) / (length[j] * sine) * rows[j]
            average[i][j] = (1 - beta) * target + beta * cosine
    return vectors.sum(dim=0), torch.tensor(average, dtype=rows.dtype), float(vectors.norm(dim=1).sum())


def _excess(jacobian: Tensor, orders: Tensor, rho: Tensor, beta: float) -> Callable[[Result], float]:
    """Return a measure of results: the distances of the update, over the vectors' lengths, and of the averages."""
    rows = jacobian.cpu()
    expected = [_on_rows(rows[group], orders.cpu(), rho[group].cpu(), beta) for group in range(len(rows))]

    def error(result: Result) -> float:
        weights, new_rho = (tensor.cpu() for tensor in result)
        worst = 0.0
        for group, (update, average, unit) in enumerate(expected):
            off = float((weights[group] @ rows[group] - update).norm()) / unit
            worst = max(worst, off, float((new_rho[group] - average).abs().max()))
        return worst

    return error


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield one group and many groups for all numbers of tasks."""
    for size in sizes(quick):
        # Many groups of very many tasks do not occur in practice.
        for groups in (1, _TENSORS) if size <= 16 else (1,):
            generator = torch.Generator().manual_seed(size)
            jacobian = torch.randn(groups, size, 300, dtype=torch.float64, generator=generator).to(device)
            orders = torch.rand(size, size, generator=generator).argsort(dim=1).to(device)
            rho = torch.rand(groups, size, size, dtype=torch.float64, generator=generator).sub(0.5).to(device)
            gram = jacobian @ jacobian.mT
            yield solver_case(
                "gradvac", f"L={groups} T={size}", (gram, orders, rho, 0.5), _excess(jacobian, orders, rho, 0.5), _BOUND
            )
