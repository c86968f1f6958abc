"""The Triton kernels: under the interpreter on the CPU, and compiled for GPUs that need not be there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
triton = pytest.importorskip("triton")

from fastmtl.benchmarks.gpu import static_triton  # noqa: E402
from fastmtl.benchmarks.gpu.triton_launches import Launch, record, recording  # noqa: E402
from fastmtl.kernels import graddrop, gram  # noqa: E402


@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    # Triton reads the variable when it is imported, so this needs a process of its own.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops/triton_cases.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "FASTMTL_BACKEND": "auto"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    return record()


def test_every_launch_is_in_the_table(launches: list[Launch]) -> None:
    assert {launch.capability for launch in launches} == {80, 90}
    assert static_triton.differences(launches, static_triton.read_table()) == []


def test_the_table_keeps_the_rules() -> None:
    assert static_triton.broken_rules(static_triton.read_table()) == []


@pytest.mark.parametrize("capability", [80, 90])
def test_the_table_is_what_the_compiler_makes(launches: list[Launch], capability: int) -> None:
    table = {row["digest"]: row for row in static_triton.read_table()}
    launch = next(x for x in launches if x.kernel.__name__ == "combine_fwd_kernel" and x.capability == capability)
    row = static_triton.measure(launch)
    if table[launch.digest]["triton"] == row["triton"]:
        assert row == table[launch.digest]
    assert static_triton.broken_rules([row]) == []


def test_a_launch_that_is_new_or_gone_is_named(launches: list[Launch]) -> None:
    table = static_triton.read_table()
    if table[0]["triton"] != triton.__version__:
        pytest.skip("the table is that of another Triton release")
    assert "is not in the table" in static_triton.differences(launches, table[1:])[0]
    assert "is gone" in static_triton.differences(launches, [*table, table[0] | {"digest": "0"}])[0]


@pytest.mark.parametrize(
    ("kernel", "change", "words"),
    [
        ("min_norm_fwd_kernel", {"local": "10"}, "spills"),
        ("pcgrad_fwd_kernel", {"stack": "40"}, "spills"),
        ("gram_fwd_kernel", {"loads_128": "0"}, "loads of 128 bits"),
        ("combine_fwd_kernel", {"stores_128": "0"}, "stores of 128 bits"),
    ],
)
def test_each_rule_is_seen_to_be_broken(kernel: str, change: dict[str, str], words: str) -> None:
    rows = (row for row in static_triton.read_table() if row["kernel"] == kernel and "%16" not in row["launch"])
    assert any(words in said for said in static_triton.broken_rules([next(rows) | change]))


def test_scalars_have_the_type_they_are_computed_in(launches: list[Launch]) -> None:
    for name in ("leak", "ridge"):
        kinds = {x.signature[name] for x in launches if name in x.signature and "rows" not in x.signature}
        assert kinds == {"fp64"}


def test_missing_rows_and_other_batch_sizes_are_not_compiled_anew() -> None:
    random = torch.zeros(2, dtype=torch.int64)
    launches: dict[str, Launch] = {}

    def launch(rows: list[Tensor | None], sizes: tuple[int, ...]) -> None:
        with recording(90, launches):
            gram.gram(rows, 3)
            graddrop.graddrop_rows(rows, 3, torch.ones(3), random, [])
            batches = [torch.empty(size, 64) for size in sizes]
            graddrop.graddrop(batches, batches, 0.5, random)

    row = torch.empty(4096)
    launch([row, row, row], (8, 8, 8))
    assert len(launches) == 3
    launch([row, None, row], (1, 3, 8))
    launch([None, row, None], (0, 16, 8))
    assert len(launches) == 3
