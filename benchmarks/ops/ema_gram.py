"""ema_gram_ and excess_risk_: against the same updates in torch operators on a state of one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from fastmtl.benchmarks.registry import Case, Variant
from fastmtl.benchmarks.shapes import as_matrix, resnet18, rows_of
from torch import Tensor

from fastmtl import ops

__all__ = ["cases"]


def _views(state: Tensor, like: Sequence[Tensor]) -> list[list[Tensor]]:
    sizes = [t.numel() for t in like]
    return [[part.view(t.shape) for part, t in zip(row.split(sizes), like, strict=True)] for row in state]


def _case(
    name: str,
    jacobian: Tensor,
    calls: dict[str, Callable[[Tensor], Tensor]],
    want: Tensor,
    allowed: float,
) -> Case:
    """Return a case that updates a state of ones; each variant has its own, restarted where the result is checked."""
    states = {variant: torch.ones_like(jacobian) for variant in calls}
    scale = want.diagonal().sqrt()

    def error(got: Tensor) -> float:
        return float(((got.double() - want) / scale[..., None] / scale).abs().max())

    def variant(key: str) -> Variant:
        return Variant(call=lambda: calls[key](states[key]), allowed=allowed if key == "fastmtl" else 1e-2)

    return Case(
        name=f"{name}, T={len(jacobian)}",
        dtype="float32",
        variants={key: variant(key) for key in calls},
        error=error,
        bytes_read=2 * jacobian.numel() * 4,
        bytes_written=jacobian.numel() * 4,
    )


def _ema(num_rows: int, device: torch.device) -> Case:
    rows = rows_of(resnet18(), num_rows, device, torch.float32)
    jacobian = as_matrix(rows)
    keep, gains = torch.full((num_rows,), 0.5, device=device), torch.linspace(0.1, 1, num_rows, device=device)
    new = 0.5 + gains.double()[:, None] * jacobian.double()

    def plain(state: Tensor) -> Tensor:
        state.mul_(keep[:, None]).addcmul_(gains[:, None], jacobian)
        return state @ state.T

    return _case(
        "ema_gram_, ResNet-18",
        jacobian,
        {
            "fastmtl": lambda state: ops.ema_gram_(_views(state, rows[0]), rows, keep, gains),
            "torch ops": plain,
        },
        new @ new.T,
        4 * torch.finfo(torch.float32).eps,
    )


def _excess(num_rows: int, device: torch.device) -> Case:
    rows = rows_of(resnet18(), num_rows, device, torch.float32)
    jacobian = as_matrix(rows)
    square = jacobian.double() ** 2

    def plain(sums: Tensor) -> Tensor:
        squares = jacobian * jacobian
        sums.add_(squares)
        return (squares / (sums + 1e-7).sqrt()).sum(1).diag()

    def fused(sums: Tensor) -> Tensor:
        return ops.excess_risk_(_views(sums, rows[0]), rows).diag()

    return _case(
        "excess_risk_, ResNet-18",
        jacobian,
        {"fastmtl": fused, "torch ops": plain},
        (square / (1 + square + 1e-7).sqrt()).sum(1).diag(),
        4 * torch.finfo(torch.float32).eps,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield both passes over the gradients of a ResNet-18."""
    for num_rows in (3,) if quick else (2, 3, 8):
        yield _ema(num_rows, device)
        yield _excess(num_rows, device)
