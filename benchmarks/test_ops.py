"""The small benchmarks of all ops as entries of pytest-benchmark: `pytest benchmarks -k gram`.

A wrong result fails before anything is timed. `fastmtl bench kernels` has all shapes and knows what the memory allows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from fastmtl.benchmarks.machine import facts
from fastmtl.benchmarks.registry import BENCHES, Case, cases_of

_CPU = torch.device("cpu")


@lru_cache(maxsize=1)
def _case(op: str, number: int) -> Case:
    return list(cases_of(op, _CPU, quick=True))[number]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    entries = [
        pytest.param(op, number, variant, id=f"{op}-{case.name}-{case.dtype}-{variant}")
        for op in BENCHES
        for number, case in enumerate(cases_of(op, _CPU, quick=True))
        for variant in case.variants
    ]
    metafunc.parametrize(("op", "number", "variant"), entries)


def test_speed(benchmark: Any, op: str, number: int, variant: str) -> None:
    case = _case(op, number)
    chosen = case.variants[variant]
    error = case.error(chosen.call())
    assert error <= chosen.allowed
    benchmark.group = f"{op}, {case.name}, {case.dtype}"
    benchmark.extra_info |= {**facts(_CPU), "error": error}
    benchmark(chosen.call)
