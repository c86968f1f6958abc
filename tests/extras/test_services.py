"""Weights & Biases (offline) and MLflow (in a folder) get the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastmtl.cli import main

SMALL = ["--encoder", "conv", "--train-size", "64", "--batch-size", "16", "--limit-batches", "2", "--no-plot"]


def test_a_run_is_sent_to_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    words = ["train", "--weighting", "mgda", *SMALL, "--no-tensorboard", "--run-dir", str(run), "--epochs", "2"]
    assert main([*words, "--logger", "wandb,mlflow"]) == 0
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    (metrics,) = (run / "mlruns").glob("*/*/metrics")
    lines = (metrics / "test_Acc" / "left").read_text().splitlines()
    # Time, value, steps done.
    assert [line.split()[2] for line in lines] == ["2", "4"]
    assert (metrics / "step_weight" / "right").exists()
    assert (metrics.parent / "params" / "weighting").read_text() == "MGDA"
    assert yaml.safe_load((metrics.parent / "meta.yaml").read_text())["status"] == 3
    assert main(["train", "--resume", str(run), "--epochs", "3"]) == 0
    assert len(list((run / "mlruns").glob("*/*/metrics"))) == 1
    assert len((metrics / "test_Acc" / "left").read_text().splitlines()) == 3
