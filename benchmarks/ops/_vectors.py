"""Ops on a few vectors with one number per task: against the same formulas in torch operators, calls included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastmtl.benchmarks.registry import Case, Variant
from torch import Tensor

from fastmtl import ops

__all__ = ["vector_cases"]


def vector_cases(
    op: str, arguments: Callable[[int], tuple[Any, ...]], device: torch.device, quick: bool
) -> Iterator[Case]:
    """Yield cases of several numbers of tasks of an op that returns a tensor.

    Args:
        op: Its name.
        arguments: Makes the arguments for T tasks, tensors on the CPU among them.
        device: Where it runs.
        quick: One case alone.
    """
    for size in (3,) if quick else (3, 8, 40):
        made = tuple(value.to(device) if isinstance(value, Tensor) else value for value in arguments(size))
        want = ops.implementation(op, "reference")(*_copies(made)).double()
        calls = {"fastmtl": getattr(torch.ops.fastmtl, op), "torch ops": ops.implementation(op, "reference")}

        def error(got: Tensor, want: Tensor = want) -> float:
            return float((got.double() - want).abs().max() / want.abs().max())

        yield Case(
            name=f"T={size}",
            dtype="float32",
            # Each call starts from the same state.
            variants={
                name: Variant(call=lambda call=call, made=made: call(*_copies(made)), allowed=1e-6)  # type: ignore[misc]
                for name, call in calls.items()
            },
            error=error,
        )


def _copies(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in values)
