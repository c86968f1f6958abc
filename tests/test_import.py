"""Importing fastmtl is cheap and touches neither devices nor compilers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "fastmtl._host",
    "matplotlib",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.tensorboard",
    "torchmetrics",
    "torchvision",
    "triton",
    "typer",
)

PROBE = """
import json, sys
import torch
before = set(sys.modules)
{statement}
print(json.dumps({{
    "modules": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "maps": open("/proc/self/maps").read() if sys.platform == "linux" else "",
}}))
"""


def probe(statement: str) -> dict[str, object]:
    """Run the statement after `import torch` in a fresh interpreter and return what it brought with it."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(statement=statement)], capture_output=True, text=True, check=True
    )
    facts: dict[str, object] = json.loads(done.stdout)
    return facts


def loaded(facts: dict[str, object], names: tuple[str, ...]) -> list[str]:
    modules = facts["modules"]
    assert isinstance(modules, list)
    return [module for module in modules if any(module == name or module.startswith(f"{name}.") for name in names)]


@pytest.mark.parametrize("statement", ["import fastmtl", "import fastmtl.ops"])
def test_import_is_lean(statement: str) -> None:
    facts = probe(statement)
    assert loaded(facts, HEAVY) == []
    assert facts["cuda"] is False
    for shared_object in ("_C.abi3", "_CUDA.abi3"):
        assert shared_object not in str(facts["maps"])


@pytest.mark.slow
def test_importing_the_package_alone_leaves_the_trainer_unloaded() -> None:
    assert loaded(probe("import fastmtl"), ("fastmtl.trainer", "fastmtl.ops", "fastmtl.data")) == []


@pytest.mark.slow
def test_the_trainer_is_reached_from_the_package() -> None:
    assert "fastmtl.trainer" in loaded(probe("from fastmtl import Trainer"), ("fastmtl.trainer",))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["architecture", "config", "loss", "metrics", "model", "utils", "weighting"])
def test_modules_of_libmtl_are_reached_from_the_package(name: str) -> None:
    assert f"fastmtl.{name}" in loaded(probe(f"import fastmtl; fastmtl.{name}.__name__"), (f"fastmtl.{name}",))


@pytest.mark.slow
def test_the_probe_sees_heavy_imports() -> None:
    facts = probe("import matplotlib, torch._dynamo")
    assert {"matplotlib", "torch._dynamo"} <= set(loaded(facts, HEAVY))


@pytest.mark.slow
def test_the_trainer_leaves_autojac_and_its_setting_alone() -> None:
    """Importing autojac turns torch's donated buffers off for the whole process."""
    assert loaded(probe("import fastmtl.trainer"), ("fastmtl.autojac",)) == []
