"""MoCo's step against torch operators, the call included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastmtl.benchmarks.ops._vectors import vector_cases
from fastmtl.benchmarks.registry import Case

__all__ = ["cases"]


def _arguments(size: int) -> tuple[Any, ...]:
    torch.manual_seed(size)
    return (torch.rand(size), torch.eye(size).double(), torch.ones(()), 0.1, 0.5, 0.1)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield cases of several numbers of tasks."""
    return vector_cases("moco_step_", _arguments, device, quick)
