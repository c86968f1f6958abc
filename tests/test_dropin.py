"""LibMTL's own examples run with nothing but their import lines changed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastmtl.data.rooms import make_rooms
from tests.data.test_office import make_office
from tests.libmtl import checkout

pytestmark = [pytest.mark.libmtl, pytest.mark.slow]

# The examples ask for pretrained weights and import torchvision themselves: neither can be had everywhere.
LAUNCHER = """
import runpy, sys
import torch
from fastmtl.model._torchvision import import_torchvision
from fastmtl.model import resnet
import_torchvision()
torch.set_num_threads(1)
resnet._load_pretrained = lambda model, name, progress: print("pretrained", name)
script = sys.argv[1]
sys.argv = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
runpy.run_path(script, run_name="__main__")
"""


def _copy(example: str, root: Path) -> Path:
    """Return a copy of the example's folder whose scripts import fastmtl."""
    folder = root / "examples" / example
    shutil.copytree(checkout() / "examples" / example, folder, ignore=shutil.ignore_patterns("data_txt", "results"))
    changed = 0
    for file in folder.glob("*.py"):
        text, count = re.subn(r"^(from|import) LibMTL\b", r"\1 fastmtl", file.read_text(), flags=re.MULTILINE)
        file.write_text(text)
        changed += count
    assert changed > 3
    return folder


def _run(folder: Path, options: str) -> str:
    script = str(folder / "main.py")
    done = subprocess.run([sys.executable, "-c", LAUNCHER, script, *options.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nyu(tmp_path: Path) -> None:
    make_rooms(tmp_path / "rooms", train=2, test=2, size=(288, 384))
    shown = _run(
        _copy("nyu", tmp_path),
        f"--weighting MGDA --arch HPS --dataset_path {tmp_path}/rooms --train_bs 2 --test_bs 2 --epochs 1 --aug "
        f"--scheduler step --mode train --save_path {tmp_path}",
    )
    assert "pretrained resnet50" in shown
    assert re.search(r"Epoch: 0000 \| TRAIN: (\d+\.\d+ )+\|.*TEST: ", shown)
    assert (tmp_path / "best.pt").is_file()


def test_office(tmp_path: Path) -> None:
    make_office(tmp_path / "images", "office-31")
    folder = _copy("office", tmp_path)
    # Short lists in place of those of the whole data set.
    shutil.copytree(tmp_path / "images" / "data_txt", folder / "data_txt")
    shown = _run(
        folder,
        f"--weighting CAGrad --arch MTAN --multi_input --dataset office-31 --dataset_path {tmp_path}/images --bs 2 "
        f"--epochs 1 --mode train",
    )
    assert "pretrained resnet18" in shown
    assert re.search(r"Epoch: 0000 \| TRAIN: .* VAL: .* TEST: ", shown)
