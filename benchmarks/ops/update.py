"""From gradients to an update, by MGDA and PCGrad: against `w @ J` with `J @ J.T`, and PCGrad vector by vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from fastmtl.benchmarks.registry import Case, Variant
from fastmtl.benchmarks.shapes import as_matrix, as_vector, resnet18, rows_of, size_of
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]


def _orders(num_rows: int, device: torch.device) -> Tensor:
    """Return a random order of the other tasks for each task."""
    drawn = torch.rand(num_rows, num_rows, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    return torch.stack([order[order != task] for task, order in enumerate(drawn)]).to(device)


def _vector_by_vector(jacobian: Tensor, orders: Tensor) -> Tensor:
    """Return PCGrad's update as its paper writes it (Yu et al. 2020), with vectors as long as the gradients."""
    projected = jacobian.clone()
    for vector, others in zip(projected, orders.tolist(), strict=True):
        for other in others:
            gradient = jacobian[other]
            product = vector.dot(gradient)
            if product < 0:
                vector -= product / gradient.norm() ** 2 * gradient
    return projected.sum(0)


def _case(method: str, num_rows: int, device: torch.device) -> Case:
    shapes = resnet18()
    rows = rows_of(shapes, num_rows, device, torch.float32)
    jacobian = as_matrix(rows)
    orders = _orders(num_rows, device)
    out = [torch.empty_like(t) for t in rows[0]]
    solvers: dict[str, Callable[[Tensor], Tensor]] = {
        "MGDA": ops.min_norm,
        "PCGrad": lambda gram: ops.pcgrad(gram, orders),
    }
    solve = solvers[method]
    exact = ops.implementation("gram", "reference")([t for row in rows for t in row], num_rows)
    want = sum(w * row.double() for w, row in zip(solve(exact), jacobian, strict=True))
    assert isinstance(want, Tensor)

    def error(got: Tensor | Sequence[Tensor]) -> float:
        flat = as_vector(got)
        return float((flat.double() - want).norm() / want.norm())

    def update() -> list[Tensor]:
        ops.combine_(out, rows, solve(ops.gram(rows)))
        return out

    def products() -> Tensor:
        return solve((jacobian @ jacobian.T).double()).to(jacobian.dtype) @ jacobian

    eps = torch.finfo(torch.float32).eps
    variants = {
        "fastmtl": Variant(call=update, allowed=8 * eps),
        # What float32 products of so many elements lose.
        "torch J @ J.T, w @ J": Variant(call=products, allowed=1e-2),
    }
    if method == "PCGrad":
        variants["torch, vector by vector"] = Variant(call=lambda: _vector_by_vector(jacobian, orders), allowed=1e-2)
    return Case(
        name=f"{method}, ResNet-18, T={num_rows}",
        dtype="float32",
        variants=variants,
        error=error,
        bytes_read=2 * size_of(shapes) * num_rows * 4,
        bytes_written=size_of(shapes) * 4,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield both methods on the gradients of a ResNet-18."""
    for num_rows in (3,) if quick else (3, 8):
        for method in ("MGDA", "PCGrad"):
            yield _case(method, num_rows, device)
