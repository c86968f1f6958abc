"""combine and combine_: against `w @ J` on a concatenated J."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from fastmtl.benchmarks.registry import Case, Variant
from fastmtl.benchmarks.shapes import as_matrix, as_vector, resnet18, rows_of, size_of
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]


def _case(num_rows: int, device: torch.device, dtype: torch.dtype) -> Case:
    shapes = resnet18()
    rows = rows_of(shapes, num_rows, device, dtype)
    jacobian = as_matrix(rows)
    weights = torch.rand(num_rows, generator=torch.Generator().manual_seed(1)).double().to(device)
    narrow = weights.to(dtype)
    out = [torch.empty_like(t) for t in rows[0]]
    want = sum(w * row.double() for w, row in zip(weights, jacobian, strict=True))
    scale = sum(w * row.double().abs() for w, row in zip(weights, jacobian, strict=True))

    def error(got: Tensor | Sequence[Tensor]) -> float:
        flat = as_vector(got)
        return float(((flat.double() - want).abs() / scale).nan_to_num(0.0).max())

    def in_place() -> list[Tensor]:
        ops.combine_(out, rows, weights)
        return out

    allowed = 4 * torch.finfo(dtype).eps
    return Case(
        name=f"ResNet-18, T={num_rows}",
        dtype=str(dtype).removeprefix("torch."),
        variants={
            "fastmtl": Variant(call=lambda: ops.combine(rows, weights), allowed=allowed),
            "fastmtl in place": Variant(call=in_place, allowed=allowed),
            "torch w @ J": Variant(call=lambda: narrow @ jacobian, allowed=num_rows * allowed),
        },
        error=error,
        bytes_read=size_of(shapes) * num_rows * dtype.itemsize,
        bytes_written=size_of(shapes) * dtype.itemsize,
        reads=[t for row in rows for t in row],
        writes=[torch.empty_like(t) for t in out],
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield the gradients of a ResNet-18 for several numbers of tasks, and once in bfloat16."""
    for num_rows in (3,) if quick else (2, 3, 8, 16, 40):
        yield _case(num_rows, device, torch.float32)
    if not quick:
        yield _case(3, device, torch.bfloat16)
