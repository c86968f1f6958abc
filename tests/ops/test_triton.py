"""The Triton kernels: under the interpreter on the CPU, and compiled for GPUs that need not be there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")


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


def _launches() -> list[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """Return name, kernel, signature and constants of launches as they are on a GPU."""
    from fastmtl.kernels import combine, graddrop, gram, min_norm, pcgrad

    square, tasks = {"gram": "*fp64", "weights": "*fp64"}, {"TASKS": 8, "PADDED": 8}
    places = ("i64",) * 3
    drop = {"random": "*i64", "noise": "*fp64"}
    batch: dict[str, Any] = {"reps": places, "grads": places, "outs": places, "sizes": ("i32",) * 3}
    batch |= {"like_rep": "*fp32", "like_grad": "*bf16", "like_out": "*bf16", **drop}
    batch |= {"leak": "fp32", "features": "i32", "largest": "i32"}
    rows: dict[str, Any] = {"rows": places, "like": "*fp32", "out": "*fp32", **drop, "leak": "*fp32"}
    rows |= {"first_number": "i32", "numel": "i32"}
    three = {"TASKS": 3, "PADDED": 4, "WIDE": False, "BLOCK": 512}
    products = {"left": ("i64",) * 8, "right": ("i64",) * 8, "like": "*fp32", "partials": "*fp64", "numel": "i32"}
    sums = {"rows": ("*fp32",) * 3, "weights": "*fp64", "out": "*fp32", "numel": "i32"}
    return [
        ("gram", gram.gram_fwd_kernel, products, {"A": 8, "B": 8, "PADDED": 8, "BLOCK": 128, "STEPS": 64}),
        ("combine", combine.combine_fwd_kernel, sums, {"ROWS": 3, "WIDE": False, "ACCUMULATE": True, "BLOCK": 2048}),
        ("graddrop", graddrop.graddrop_fwd_kernel_batch, batch, {**three, "SHARED": True, "GIVEN": False}),
        ("graddrop own", graddrop.graddrop_fwd_kernel_batch, batch, {**three, "SHARED": False, "GIVEN": True}),
        ("graddrop rows", graddrop.graddrop_fwd_kernel_rows, rows, {**three, "GIVEN": False}),
        ("min_norm", min_norm.min_norm_fwd_kernel, {**square, "ridge": "fp64"}, {**tasks, "LIMIT": 160}),
        ("pcgrad", pcgrad.pcgrad_fwd_kernel, {**square, "orders": "*i64"}, {**tasks, "STEPS": 8, "BY_KEY": False}),
        ("pcgrad keys", pcgrad.pcgrad_fwd_kernel, {**square, "orders": "*fp32"}, {**tasks, "STEPS": 8, "BY_KEY": True}),
    ]


NAMES = ["gram", "combine", "graddrop", "graddrop own", "graddrop rows", "min_norm", "pcgrad", "pcgrad keys"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_and_spill_nothing(name: str, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, signature, constants = next(launch for launch in _launches() if launch[0] == name)
    # Memory aligned to 16 bytes and lengths that are multiples of 16, as those of most parameters are.
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, argument in enumerate(kernel.arg_names):
        kind = signature.get(argument)
        if isinstance(kind, tuple):
            attributes |= {(index, inner): [["tt.divisibility", 16]] for inner in range(len(kind))}
        elif argument == "numel" or (isinstance(kind, str) and kind.startswith("*")):
            attributes[index,] = [["tt.divisibility", 16]]
    ordered = {key: signature.get(key, "constexpr") for key in kernel.arg_names}
    source = ASTSource(kernel, ordered, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    ptx = compiled.asm["ptx"]
    assert "ld.local" not in ptx
    assert "st.local" not in ptx
    if name == "combine":
        assert re.search(r"ld\.global[^ ]*v4\.b32", ptx)
        assert re.search(r"st\.global[^ ]*v4\.b32", ptx)
