"""What a benchmark of an op is, and the table of them: one module in `benchmarks/ops` per op, with the op's name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BENCHES", "Case", "Variant", "cases_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to compute a case.

    Attributes:
        call: Computes the result; what it needs is prepared before.
        allowed: Greatest error, as measured by the case, at which its speed counts.
    """

    call: Callable[[], Any]
    allowed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape of one op.

    Attributes:
        name: The shape in words, such as ``"ResNet-18, T=3"``.
        dtype: Dtype of the inputs.
        variants: The ways to compute it; ``"fastmtl"`` is ours.
        error: Error of a result against float64.
        bytes_read: Bytes that must be read; 0 where memory is not the limit.
        bytes_written: Bytes that must be written.
        multiply_adds: Float32 multiply-adds that must be done; 0 where they are few.
        reads: The tensors that are read, for a pass over them that computes nothing; none where that says little.
        writes: Tensors like those that are written.
    """

    name: str
    dtype: str
    variants: Mapping[str, Variant]
    error: Callable[[Any], float]
    bytes_read: int = 0
    bytes_written: int = 0
    multiply_adds: int = 0
    reads: Sequence[Tensor] = ()
    writes: Sequence[Tensor] = ()


BENCHES = (
    "gram",
    "combine",
    "aligned",
    "cagrad",
    "cap_norm",
    "config",
    "dual_cone",
    "ema_gram",
    "fairgrad",
    "famo",
    "graddrop",
    "gradvac",
    "imtl",
    "min_norm",
    "moco",
    "nash",
    "nonneg_qp",
    "pcgrad",
    "sum_rows",
    "update",
    "upgrad",
    "watch",
)


def cases_of(op: str, device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield the cases of an op, each with inputs made when it is reached."""
    module = importlib.import_module(f"fastmtl.benchmarks.ops.{op}")
    yield from module.cases(device, quick)
