"""Fixtures for all tests."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# What has been found wanting elsewhere must not stop a change that has nothing to do with it.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Inductor would start processes that compile beside each that trains: they import torch first, which takes longer than
# what they compile, and `make test` keeps all cores busy already. Children take it over.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Files of few and long tests. They come first, so that of several processes none is left alone with one at the end.
LONG = (
    *("tests/test_packaging.py", "tests/ops/test_triton.py", "tests/ops/test_registry.py", "tests/distributed/"),
    *("tests/test_example_scripts.py", "tests/cli/test_main_job.py", "tests/trainer/test_recompiles.py"),
    *("tests/trainer/test_compile.py", "tests/trainer/test_traced.py", "tests/benchmarks/test_gpu.py"),
)
HAS_GPU = torch.cuda.is_available()
CREATORS = ("empty", "empty_like", "empty_strided")
# Of glibc's malloc.h.
_M_PERTURB = -6


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def _poisoning(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def created(*args: Any, **kwargs: Any) -> Tensor:
        tensor = create(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return created


@pytest.fixture(scope="session", autouse=True)
def hidden_gpus() -> Iterator[None]:
    """Hide GPUs from trainers, which take the first that they see."""
    with pytest.MonkeyPatch.context() as patch:
        if HAS_GPU:
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True)
def shown_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Show them to the tests of ops and those that name cuda or a gpu; hide them from processes that others start."""
    if HAS_GPU and any(word in request.node.nodeid for word in ("tests/ops/", "cuda", "gpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    elif HAS_GPU:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, so that code which forgets to write an element is seen.

    What compiled kernels allocate is filled by glibc with the byte 0xFE: floats around -1e38 and -1e303.
    """
    for name in CREATORS:
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", _poisoning(Tensor.new_empty))
    libc = ctypes.CDLL(None)
    perturb = getattr(libc, "mallopt", lambda option, value: None)
    perturb(_M_PERTURB, 0x01)
    yield
    perturb(_M_PERTURB, 0)


@pytest.fixture
def eager_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compiled graphs, backward passes too, run as torch traces them, without inductor and the C++ compiler.

    For tests of what is compiled and how often; test_compile and test_ways compare what inductor makes of graphs.
    """
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("fastmtl.engine.regions.compile_graph", aot_eager)
    torch.compiler.reset()


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Let networks and data be float64, for values that are compared with those of plain autograd."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
