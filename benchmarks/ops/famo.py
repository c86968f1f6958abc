"""FAMO's weights against torch operators, the call included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastmtl.benchmarks.ops._vectors import vector_cases
from fastmtl.benchmarks.registry import Case

__all__ = ["cases"]


def _arguments(size: int) -> tuple[Any, ...]:
    torch.manual_seed(size)
    return (torch.rand(size), 1 + torch.rand(size), torch.zeros(size))


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield cases of several numbers of tasks."""
    return vector_cases("famo_weights", _arguments, device, quick)
