"""group_rows and sum_rows on the bags of a batch: against torch's coalescing of the same sparse gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fastmtl.benchmarks.registry import Case, Variant
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]

_ROWS, _WIDTH = 1_000_000, 32


def _case(bags: int, per_bag: int, tasks: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(tasks)
    ids = torch.randint(_ROWS, (bags * per_bag,), generator=generator).to(device)
    bag = torch.arange(bags, device=device).repeat_interleave(per_bag)
    values = [torch.randn(bags, _WIDTH, generator=generator).to(device) for _ in range(tasks)]
    want = torch.zeros(tasks, int(ids.unique().numel()), _WIDTH, dtype=torch.float64, device=device)
    places = ids.unique(return_inverse=True)[1]
    for total, value in zip(want, values, strict=True):
        total.index_add_(0, places, value[bag].double())

    def ours() -> list[Tensor]:
        _, order, starts = ops.group_rows(ids)
        return ops.sum_rows(values, order, starts, bag)

    def plain() -> list[Tensor]:
        sparse = (
            torch.sparse_coo_tensor(ids[None], value[bag], (_ROWS, _WIDTH), check_invariants=False) for value in values
        )
        return [each.coalesce().values() for each in sparse]

    def error(got: list[Tensor]) -> float:
        return float((torch.stack(got).double() - want).abs().max())

    return Case(
        name=f"{bags} bags of {per_bag}, T={tasks}",
        dtype="float32",
        variants={
            "fastmtl": Variant(call=ours, allowed=1e-5),
            "torch coalesce": Variant(call=plain, allowed=1e-5),
        },
        error=error,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield batches of several sizes."""
    yield _case(512, 20, 2, device)
    if not quick:
        yield _case(512, 20, 8, device)
        yield _case(8192, 20, 2, device)
