"""gram: against `J @ J.T` on a concatenated J, with and without the concatenation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastmtl.benchmarks.registry import Case, Variant
from fastmtl.benchmarks.shapes import as_matrix, resnet18, rows_of, size_of
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]


def _case(num_rows: int, device: torch.device, dtype: torch.dtype) -> Case:
    shapes = resnet18()
    rows = rows_of(shapes, num_rows, device, dtype)
    jacobian = as_matrix(rows)
    want = ops.implementation("gram", "reference")([t for row in rows for t in row], num_rows)
    scale = want.diagonal().sqrt()

    def error(got: Tensor) -> float:
        return float(((got.double() - want) / scale[:, None] / scale).abs().max())

    eps = torch.finfo(torch.float32).eps
    torch_error = max(error(jacobian @ jacobian.T), 1e-2)
    variants = {
        "fastmtl": Variant(call=lambda: ops.gram(rows), allowed=4 * eps),
        "torch J @ J.T": Variant(call=lambda: jacobian @ jacobian.T, allowed=torch_error),
    }
    if num_rows == 3:
        # Once is enough to see what it costs: gigabytes of fresh pages disturb what is timed beside it.
        variants["torch cat, J @ J.T"] = Variant(call=lambda: (j := as_matrix(rows)) @ j.T, allowed=torch_error)
    return Case(
        name=f"ResNet-18, T={num_rows}",
        dtype=str(dtype).removeprefix("torch."),
        variants=variants,
        error=error,
        bytes_read=size_of(shapes) * num_rows * dtype.itemsize,
        multiply_adds=size_of(shapes) * num_rows * (num_rows + 1) // 2,
        reads=[t for row in rows for t in row],
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield the gradients of a ResNet-18 for several numbers of tasks, and once in bfloat16."""
    for num_rows in (3,) if quick else (2, 3, 8, 16, 40):
        yield _case(num_rows, device, torch.float32)
    if not quick:
        yield _case(3, device, torch.bfloat16)
