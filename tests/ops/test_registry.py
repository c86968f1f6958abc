"""How ops choose their backend, and what they say when they cannot have it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmtl import ops
from fastmtl.errors import BackendError, UsageError
from fastmtl.ops import _loader
from fastmtl.ops._registry import OPS
from fastmtl.support import env
from tests.ops.rows import backend_kernel

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_EXTENSION = """
import pathlib, fastmtl.ops._loader as loader
loader._SHARED_OBJECT = {"cpp": "_absent.abi3.so", "cuda": "_absent_cuda.abi3.so"}
"""
CALL = """
import torch
from fastmtl import ops
result = ops.gram([[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]])
ops.combine([[torch.ones(2)]], torch.ones(1))
ops.gram([[torch.ones(2)]])
print(result.tolist())
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.parametrize("name", ["gram", "combine", "combine_", "min_norm"])
def test_every_op_has_its_reference_and_its_kernel(name: str) -> None:
    assert name in OPS
    assert callable(ops.implementation(name, "reference"))
    assert backend_kernel(name, "cpp").name() == f"fastmtl_cpp::{name}"


def test_names_are_taken_in_any_case_and_a_typo_names_the_nearest() -> None:
    assert ops.implementation("GRAM", "Reference") is ops.implementation("gram", "reference")
    with pytest.raises(UsageError, match="Did you mean 'gram'"):
        ops.implementation("grum", "reference")
    with pytest.raises(UsageError, match="Unknown backend 'cp'"):
        ops.implementation("gram", "cp")


def test_a_kernel_that_does_not_exist_is_explained() -> None:
    with pytest.raises(BackendError, match="The triton backend of nash is not available: nash has no Triton kernel"):
        ops.implementation("nash", "triton")


def test_report_names_op_device_backend_and_what_is_absent() -> None:
    report = ops.backend_report()
    assert {(entry["op"], entry["device"]) for entry in report} == {(op, d) for op in OPS for d in ("cpu", "cuda")}
    for entry in report:
        assert entry["backend"] in _loader.BACKENDS
        assert bool(entry["absent"]) == (entry["backend"] == "reference" or "cuda: " in entry["absent"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference", "cpp"])
def test_a_forced_backend_serves(backend: str) -> None:
    if backend == "cpp":
        backend_kernel("gram", "cpp")
    done = run(CALL, FASTMTL_BACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[5.0, 1.0], [1.0, 10.0]]"
    if backend != "auto":
        assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_for_another_device_is_refused(backend: str) -> None:
    done = run(CALL, FASTMTL_BACKEND=backend)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"fastmtl.errors.BackendError: FASTMTL_BACKEND={backend} cannot serve gram on cpu")


@pytest.mark.slow
def test_a_forced_backend_that_is_not_built_is_refused() -> None:
    done = run(WITHOUT_EXTENSION + CALL, FASTMTL_BACKEND="cpp")
    assert done.returncode != 0
    assert "FASTMTL_BACKEND=cpp cannot serve gram on cpu: _absent.abi3.so was not built" in done.stderr


@pytest.mark.slow
def test_a_wrong_choice_names_the_right_ones() -> None:
    done = run(CALL, FASTMTL_BACKEND="fastest")
    assert done.returncode != 0
    assert "FASTMTL_BACKEND must be one of auto, reference, cpp, triton, cuda, got 'fastest'." in done.stderr


@pytest.mark.slow
def test_fallback_is_logged_once_with_its_reason() -> None:
    done = run(WITHOUT_EXTENSION + CALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[5.0, 1.0], [1.0, 10.0]]"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "on cpu (cpp: _absent.abi3.so was not built" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(isa: str) -> None:
    backend_kernel("gram", "cpp")
    code = """
import torch
from fastmtl import ops
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for num_rows in (1, 3, 4, 9, 16):
        lengths = (1, 63, 129, 5003, 2_200_003 if (dtype, num_rows) == (torch.float32, 3) else 1009)
        flat = [torch.randn(n, generator=g).to(dtype) for _ in range(num_rows) for n in lengths]
        weights = torch.randn(num_rows, generator=g)
        a, b = (ops.implementation("gram", x)(flat, num_rows) for x in ("cpp", "reference"))
        scale = b.diagonal().sqrt()
        assert ((a - b).abs() <= 1e-6 * scale[:, None] * scale).all()
        pair = (ops.implementation("combine", x)(flat, num_rows, weights) for x in ("cpp", "reference"))
        for a, b in zip(*pair, strict=True):
            assert torch.allclose(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
        numbers = torch.tensor([3, 4])
        whole = [(t * 2).round() for t in flat]
        for op, args in (("graddrop_rows", (whole, num_rows, torch.full((num_rows,), 0.5), numbers, [])),
                         ("graddrop", ([whole[1][None]], [t[None] for t in whole[1:2]], 0.5, numbers))):
            pair = (ops.implementation(op, x)(*args) for x in ("cpp", "reference"))
            for a, b in zip(*pair, strict=True):
                assert torch.allclose(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
        states = [[t.abs().float() for t in flat] for _ in range(2)]
        ones = torch.full((num_rows,), 0.5)
        pair = zip(("cpp", "reference"), states, strict=True)
        a, b = (ops.implementation("ema_gram_", x)(s, flat, num_rows, ones, ones) for x, s in pair)
        assert ((a - b).abs() <= 2e-6 * b.diagonal().sqrt()[:, None] * b.diagonal().sqrt() + 1e-30).all()
        pair = zip(("cpp", "reference"), states, strict=True)
        a, b = (ops.implementation("excess_risk_", x)(s, flat, num_rows, 1e-7) for x, s in pair)
        assert torch.allclose(a, b, rtol=1e-5)
"""
    done = run(code, FASTMTL_ISA=isa)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_import_loads_no_backend() -> None:
    code = "import sys, fastmtl.ops; from fastmtl.ops import _loader; assert not _loader._library.cache_info().currsize"
    done = run(code + "; assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_dispatcher_op_without_tensors_falls_back_to_the_reference() -> None:
    assert torch.equal(torch.ops.fastmtl.gram.default([None, None], 2), torch.zeros(2, 2, dtype=torch.float64))


def test_variables_are_described_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, variable in env.VARIABLES.items():
        monkeypatch.delenv(name, raising=False)
        assert env.read(name) == variable.default
        assert variable.meaning.endswith(".")
        if not variable.options:
            monkeypatch.setenv(name, " /Some/Where ")
            assert env.read(name) == "/Some/Where"
            continue
        assert variable.default in variable.options
        monkeypatch.setenv(name, f" {variable.options[0].upper()} ")
        assert env.read(name) == variable.options[0]
        monkeypatch.setenv(name, "nonsense")
        with pytest.raises(UsageError, match=f"{name} must be one of"):
            env.read(name)
