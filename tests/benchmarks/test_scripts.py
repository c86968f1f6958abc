"""Other projects' training scripts, timed from outside."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from fastmtl.benchmarks.apart import Apart
from fastmtl.benchmarks.peers.clock import ScriptSteps
from fastmtl.benchmarks.peers.scripts import Setting, find_scripts
from fastmtl.benchmarks.recipe import run_recipe_step

from fastmtl.errors import UsageError

# A step that sleeps 0.05 s, a loader that sleeps 0.3 s, and an optimizer of weights that is not the network's.
_SCRIPT = """
import sys, time, torch
from torch.utils.data import DataLoader
assert sys.argv[1:] == ["--method", "mgda", "--data-path", "photographs", "--batch-size", "2"]
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2 * {steps}
    def __getitem__(self, index):
        time.sleep(0.15)
        return torch.ones(40)
network = torch.nn.Linear(40, 40).cuda()
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
weights = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
open("written.txt", "w").write("beside the script")
for epoch in range({epochs}):
    for batch in DataLoader(Rows(), batch_size=2, num_workers=2):
        optimizer.zero_grad()
        network(batch.cuda()).sum().backward()
        time.sleep(0.05)
        weights.step()
        optimizer.step()
    time.sleep(1)
"""


def _checkout(folder: Path, steps: int, epochs: int = 1) -> Path:
    script = folder / "experiments" / "celeba" / "trainer.py"
    script.parent.mkdir(parents=True)
    script.write_text(_SCRIPT.format(steps=steps, epochs=epochs))
    return folder


def test_a_step_lasts_from_optimizer_to_optimizer_without_the_loader(tmp_path: Path) -> None:
    checkout = _checkout(tmp_path / "FAMO", steps=4, epochs=2)
    setting = Setting(strategy="MGDA", batch=2, data="photographs")
    script = Apart("FAMO's script", partial(ScriptSteps, "celeba", checkout, setting, torch.device("cpu")))
    assert 0.05 <= script.seconds(2) < 0.25
    # Between two epochs it evaluates, for a second.
    assert script.seconds(1) < 0.25
    script()
    script()
    with pytest.raises(RuntimeError, match="it has no more steps"):
        script()
    assert [path.name for path in checkout.iterdir()] == ["experiments"]


def test_a_script_that_fails_says_so(tmp_path: Path) -> None:
    checkout = _checkout(tmp_path / "FAMO", steps=5)
    setting = Setting(strategy="PCGrad", batch=2, data="photographs")
    with pytest.raises(RuntimeError, match="the script ended: AssertionError"):
        Apart("FAMO's script", partial(ScriptSteps, "celeba", checkout, setting, torch.device("cpu")))


def test_a_script_is_known_by_its_file_and_has_some_strategies(tmp_path: Path) -> None:
    checkout = _checkout(tmp_path / "FAMO", steps=1)
    ((found, script),) = find_scripts("celeba", [checkout])
    assert (found, script.project) == (checkout, "FAMO")
    assert script.has("FAMO", checkout)
    assert not script.has("UPGrad", checkout)
    with pytest.raises(UsageError, match=r"no script for the recipe cityscapes in .*: it would be FAMO's"):
        run_recipe_step("cityscapes", ["MGDA"], scripts=[checkout])
