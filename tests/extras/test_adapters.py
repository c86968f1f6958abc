"""Adapters of a small decoder, trained with two losses in several trainers: all equal to a plain loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def _train(folder: Path, launcher: list[str], *ways: str) -> list[dict[str, list[Tensor]]]:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests/extras/adapters.py"), str(folder), *ways],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(path) for path in sorted(folder.glob("*.pt"))]


def _assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    # Llama's norms compute in float32.
    for adapter, each in zip(found, wanted, strict=True):
        torch.testing.assert_close(adapter, each, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> dict[str, list[Tensor]]:
    folder = tmp_path_factory.mktemp("adapters") / "one"
    return _train(folder, [], "loop", "transformers", "lightning", "accelerate")[0]


def test_each_trainer_does_what_a_plain_loop_does(alone: dict[str, list[Tensor]]) -> None:
    # Those that begin with zero have moved by far more than what is compared.
    assert all(adapter.abs().max() > 1e-3 for adapter in alone["loop"])
    for way in ("transformers", "lightning", "accelerate"):
        _assert_close(alone[way], alone["loop"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways",
    [("lightning", "lightning-fsdp"), ("transformers", "accelerate", "accelerate-fsdp")],
    ids=lambda ways: "+".join(ways),
)
def test_two_processes_do_what_one_does(ways: tuple[str, ...], alone: dict[str, list[Tensor]], tmp_path: Path) -> None:
    processes = _train(tmp_path / "two", TWO, *ways)
    assert len(processes) == 2
    for found in processes:
        for way in ways:
            _assert_close(found[way], alone["loop"])
