"""Memory that a step frees stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from fastmtl.support.memory import keep_freed_memory

_FAULTS = """
import resource, torch
from torch import nn
from fastmtl import Trainer
from fastmtl.loss import CELoss
from fastmtl.metrics import AccMetric

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    rows = [torch.ones(1 << 20) for _ in range(24)]
    del rows
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

tasks = {"a": {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]}}
Trainer(tasks, "EW", "HPS", lambda: nn.Linear(2, 2), {"a": nn.Linear(2, 2)}, False, False,
        {"optim": "sgd", "lr": 0.1}, None, device="cpu")
faults()
faults()
print(faults())
"""


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


@pytest.mark.slow
def test_a_trainer_on_the_cpu_keeps_memory_for_the_next_step() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True, env=kept)
    # Some 24,500 where the memory goes back to the system.
    assert int(done.stdout.split()[-1]) < 6000


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "131072")
    assert not keep_freed_memory.__wrapped__()
