"""What `fastmtl.load` reads, what it refuses, and which code it runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastmtl
from fastmtl.cli import main
from fastmtl.errors import CheckpointError, UsageError

# Leaves a file beside it when it is imported.
NAMED = """
from pathlib import Path
Path(__file__).with_suffix(".imported").touch()
"""


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def _change(path: Path, change: Callable[[Any], None]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_best_and_last_are_the_weights_of_their_files(copied: Path) -> None:
    _change(copied / "last.pt", lambda content: content["model"]["decoders.left.2.bias"].fill_(3))
    best, last = fastmtl.load(copied), fastmtl.load(copied, checkpoint="last")
    assert (last.network.decoders["left"][2].bias == 3).all()
    assert not (best.network.decoders["left"][2].bias == 3).any()
    for name, tensor in best.network.state_dict().items():
        assert name == "decoders.left.2.bias" or torch.equal(tensor, last.network.state_dict()[name]), name


def test_what_is_missing_is_one_sentence(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no run directory"):
        fastmtl.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        fastmtl.load(copied, checkpoint="other.pt")
    (copied / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.json, which `fastmtl train` writes"):
        fastmtl.load(copied)


@pytest.mark.parametrize("name", ["encoder.more.weight", "gate.left.weight"])
def test_tensors_of_another_network_are_refused(copied: Path, name: str) -> None:
    _change(copied / "best.pt", lambda content: content.update({name: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"is of another model: .* is not in the model"):
        fastmtl.load(copied)


def test_tensors_of_losses_and_strategies_are_left_out(copied: Path) -> None:
    assert "loss_scale" in torch.load(copied / "best.pt", weights_only=True)
    _change(copied / "best.pt", lambda content: content.update({"loss_fn.left.weight": torch.zeros(2)}))
    fastmtl.load(copied)


def test_loading_runs_no_code_of_losses_metrics_strategies_and_loggers(copied: Path, tmp_path: Path) -> None:
    for what in ("loss", "metric", "weighting", "logger"):
        (tmp_path / f"{what}_of_test.py").write_text(NAMED)
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config |= {
        "loss": {"left": f"{tmp_path / 'loss_of_test.py'}:New"},
        "metric": {"left": {"name": f"{tmp_path / 'metric_of_test.py'}:New", "weight": [1]}},
        "weighting": f"{tmp_path / 'weighting_of_test.py'}:New",
        "logger": f"{tmp_path / 'logger_of_test.py'}:New",
    }
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    assert set(fastmtl.load(copied)(torch.randn(1, 3, 32, 32))) == {"left", "right"}
    assert main(["export", str(copied), "--format", "safetensors", "--out", str(out)]) == 0
    assert not list(tmp_path.glob("*.imported"))


def test_a_loss_of_the_user_s_leaves_a_task_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "my_losses.py").write_text(
        "import torch\n\n\ndef mine(pred, gt):\n    return torch.nn.functional.multi_margin_loss(pred, gt)\n"
    )
    words = ["--encoder", "conv", "--train-size", "48", "--batch-size", "16", "--limit-batches", "1", "--no-plot"]
    words += ["--no-tensorboard", "--device", "cpu", "--loss", f"left={tmp_path / 'my_losses.py'}:mine"]
    assert main(["train", *words, "--run-dir", str(tmp_path / "run")]) == 0
    assert [about.kind for about in fastmtl.load(tmp_path / "run").tasks.values()] == ["classes", "classes"]
    assert "| left | classes | 10 |" in (tmp_path / "run" / "README.md").read_text()


OF_DATA = """
import os

import torch
from torch import nn

from fastmtl.data import DatasetInfo, classes


def load_splits(options):
    if os.environ.get("GONE"):
        raise FileNotFoundError(2, "No such file", "rows.csv")
    rows = [(torch.randn(6), {"a": row % 2, "b": row % 3}) for row in range(16)]
    splits = options.splits(train=rows, test=rows)
    width = len(rows[0][0])
    splits.build_encoder = lambda: nn.Linear(width, 64)
    return splits


def make():
    return DatasetInfo(tasks={"a": classes(2), "b": classes(3)}, load_splits=load_splits)
"""


def test_an_encoder_that_is_made_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_data.py").write_text(OF_DATA)
    words = ["--dataset", f"{tmp_path / 'of_data.py'}:make", "--batch-size", "8", "--no-plot", "--no-tensorboard"]
    run = tmp_path / "run"
    assert main(["train", *words, "--epochs", "1", "--device", "cpu", "--run-dir", str(run)]) == 0
    assert fastmtl.load(run)(torch.randn(3, 6))["b"].shape == (3, 3)
    monkeypatch.setenv("GONE", "1")
    with pytest.raises(CheckpointError, match=r"is made of its data \(build_encoder of Splits\), .*: .*rows.csv"):
        fastmtl.load(run)
