"""What the benchmarks of all solvers share: random Gram matrices, and cases that time the op beside its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from fastmtl.benchmarks.registry import Case, Variant
from torch import Tensor

from fastmtl import ops

__all__ = ["distance_cases", "normal", "sizes", "solver_case"]


def sizes(quick: bool, most: int = 128) -> list[int]:
    """Return the numbers of tasks to time, up to ``most``."""
    return [size for size in ((3, 16) if quick else (2, 3, 8, 16, 40, 64, 128)) if size <= most]


def normal(size: int, generator: torch.Generator, width: int = 1000) -> Tensor:
    """Return (size, width) normal gradients in float64."""
    return torch.randn(size, width, dtype=torch.float64, generator=generator)


def solver_case(
    op: str,
    name: str,
    arguments: tuple[object, ...],
    error: Callable[[Any], float],
    bound: float,
    others: Mapping[str, Variant] | None = None,
) -> Case:
    """Return a case of an op and its reference, both of which must keep the bound; the call is timed with all it does.

    Args:
        op: Name of the op.
        name: The case in words.
        arguments: Those of the op.
        error: Measures a result.
        bound: Greatest error allowed.
        others: Further ways to compute it.
    """
    calls = {"fastmtl": getattr(ops, op), "reference": ops.implementation(op, "reference")}
    variants = {key: Variant(call=partial(call, *arguments), allowed=bound) for key, call in calls.items()}
    return Case(name=name, dtype="float64", variants={**variants, **(others or {})}, error=error)


def distance_cases(op: str, device: torch.device, quick: bool, *options: float) -> Iterator[Case]:
    """Yield cases of random gradients, whose weights are measured by their distance from the reference's.

    A weight counts by its gradient's length.
    """
    for size in sizes(quick):
        jacobian = normal(size, torch.Generator().manual_seed(size))
        gram = jacobian @ jacobian.T
        length = gram.diagonal().sqrt()
        expected: Tensor = ops.implementation(op, "reference")(gram, *options) * length

        def error(weights: Tensor, length: Tensor = length, expected: Tensor = expected) -> float:
            return float((weights.cpu() * length - expected).norm() / expected.norm())

        yield solver_case(op, f"random T={size}", (gram.to(device), *options), error, 1e-9)
