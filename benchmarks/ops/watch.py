"""watch_ against the same look in torch operators, the call included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastmtl.benchmarks.registry import Case, Variant

from fastmtl import ops

__all__ = ["cases"]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield steps of several numbers of tasks."""
    reference = ops.implementation("watch_", "reference")
    for size in (3,) if quick else (3, 8, 40):
        losses, gram = torch.rand(size, device=device), torch.eye(size, dtype=torch.float64, device=device)
        numbers: tuple[Any, ...] = (losses, gram, losses.double(), losses < 0)
        state = (
            torch.zeros((), device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
            torch.zeros(5, size, dtype=torch.float64, device=device),
        )

        def ours(state: Any = state, numbers: Any = numbers) -> float:
            ops.watch_(*state, *numbers)
            return float(state[0])

        def plain(state: Any = state, numbers: Any = numbers) -> float:
            reference(*state, *numbers)
            return float(state[0])

        yield Case(
            name=f"T={size}",
            dtype="float32",
            variants={"fastmtl": Variant(call=ours, allowed=0), "torch ops": Variant(call=plain, allowed=0)},
            error=lambda flag: abs(flag),
        )
