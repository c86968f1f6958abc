"""The examples train, save and test what they saved."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastmtl.data.rooms import make_rooms
from tests.data.test_office import make_office

ROOT = Path(__file__).parent.parent


def _run(script: str, options: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTMTL_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *options.split(), "--save_path", str(folder)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _last_scores(shown: str) -> str:
    found = re.findall(r"TEST: (.*) \| Time", shown)
    assert found
    return str(found[-1])


@pytest.mark.slow
def test_nyu(tmp_path: Path) -> None:
    make_rooms(tmp_path / "rooms", train=4, test=2, size=(32, 40))
    options = f"--dataset_path {tmp_path}/rooms --train_bs 2 --test_bs 2 --weighting MGDA"
    trained = _run("nyu.py", f"{options} --epochs 1 --aug", tmp_path)
    tested = _run("nyu.py", f"{options} --mode test --load_path {tmp_path}", tmp_path)
    assert _last_scores(tested) == _last_scores(trained)


@pytest.mark.slow
def test_office(tmp_path: Path) -> None:
    make_office(tmp_path / "images", "office-31")
    shown = _run(
        "office.py", f"--dataset_path {tmp_path}/images --multi_input --bs 2 --epochs 1 --weighting PCGrad", tmp_path
    )
    assert re.search(r"Epoch: 0000 \| TRAIN: .* VAL: .* TEST: ", shown)
    assert (tmp_path / "best.pt").is_file()
