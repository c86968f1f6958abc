"""cap_norm against torch operators, the call included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastmtl.benchmarks.ops._vectors import vector_cases
from fastmtl.benchmarks.registry import Case

__all__ = ["cases"]


def _arguments(size: int) -> tuple[Any, ...]:
    torch.manual_seed(size)
    return (torch.eye(size).double(), torch.rand(size), 1.0)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield cases of several numbers of tasks."""
    return vector_cases("cap_norm", _arguments, device, quick)
