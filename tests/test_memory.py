"""Memory that a step frees stays with the process; large tables lie in huge pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastmtl import Trainer
from fastmtl.loss import CELoss
from fastmtl.metrics import AccMetric
from fastmtl.support.memory import keep_freed_memory, use_huge_pages, zeros_in_huge_pages

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


def _huge_bytes(tensor: Tensor) -> int:
    """Return how much of a tensor's memory lies in huge pages."""
    place, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= place + tensor.nbytes // 2 < end
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0


def _system_has_huge_pages() -> bool:
    probe = torch.empty(64 << 20, dtype=torch.uint8)
    return use_huge_pages(probe) and _huge_bytes(probe.zero_()) > 0


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Embedding(100, 8)
        self.large = nn.EmbeddingBag(1_200_000, 8, sparse=True)

    def forward(self, ids: Tensor) -> Tensor:
        features: Tensor = self.large(ids) + self.small(ids % 100).mean(1)
        return features


@pytest.mark.skipif(not _system_has_huge_pages(), reason="the system gives no huge pages")
@pytest.mark.parametrize("optim", ["sparseadam", "adagrad"])
def test_large_tables_and_their_state_lie_in_huge_pages(optim: str) -> None:
    network = _Words()
    numbers = network.large.weight.detach().clone()
    trainer = Trainer(
        {"a": {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]}},
        "EW", "HPS", lambda: network, nn.ModuleDict({"a": nn.Linear(8, 3)}), False, False,
        {"optim": optim, "lr": 0.1}, None, device="cpu",
    )  # fmt: skip
    assert torch.equal(network.large.weight, numbers)
    batch = [(torch.randint(1_200_000, (16, 4)), {"a": torch.randint(3, (16,))})]
    trainer.train(batch, batch, 1)
    state = trainer.optimizer.state[network.large.weight]
    for tensor in (network.large.weight, *(value for value in state.values() if value.dim() == 2)):
        assert _huge_bytes(tensor) > tensor.nbytes // 2


def test_zeros_are_zeros_and_small_or_shared_memory_is_left_alone() -> None:
    like = torch.full((3, 4), 2.0, dtype=torch.float64)
    assert torch.equal(zeros_in_huge_pages(like), torch.zeros_like(like))
    assert not use_huge_pages(like)
    assert not use_huge_pages(torch.zeros(64 << 20, dtype=torch.uint8).share_memory_())
    assert not use_huge_pages(torch.empty(64 << 20, dtype=torch.uint8, device="meta"))
