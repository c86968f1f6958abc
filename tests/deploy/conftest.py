"""A small finished run for the tests of what comes after training."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmtl.cli import main

SMALL = ["--encoder", "conv", "--train-size", "64", "--batch-size", "16", "--limit-batches", "3"]


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    quiet = ["--no-plot", "--no-tensorboard", "--device", "cpu"]
    assert main(["train", "--weighting", "uw", *SMALL, *quiet, "--run-dir", str(folder)]) == 0
    return folder
