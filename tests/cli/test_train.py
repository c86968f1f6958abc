"""`fastmtl train` and `fastmtl eval` on a small network and a few steps of real data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from fastmtl.cli import main
from fastmtl.trainer.log.jsonl import read_jsonl

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SMALL = ["--encoder", "conv", "--train-size", "96", "--batch-size", "16", "--limit-batches", "3", "--log-every", "2"]


def _train(run: Path, *more: str, settings: Sequence[str] = SMALL) -> int:
    return main(["train", *settings, "--device", "cpu", "--run-dir", str(run), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert _train(run, "--weighting", "mgda", "--epochs", "2") == 0
    return run


def test_run_directory_holds_everything(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml",
        "model.json",
        "README.md",
        "best.pt",
        "last.pt",
        "metrics.jsonl",
        "tensorboard",
        "curves.png",
        "train.log",
    }
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").iterdir())


def test_log_file_holds_what_was_printed(finished: Path) -> None:
    text = (finished / "train.log").read_text()
    assert "Weighting: MGDA" in text
    assert "mgda_gn: none" in text
    assert "Epoch: 0001 | TRAIN:" in text
    assert f"fastmtl eval {finished}" in text


def test_metrics_hold_steps_and_epochs(finished: Path) -> None:
    rows = read_jsonl(finished / "metrics.jsonl")
    steps = [row for row in rows if row["event"] == "steps"]
    assert [(row["epoch"], row["step"]) for row in steps] == [(0, 2), (0, 3), (1, 5), (1, 6)]
    assert sum(steps[0]["weight"].values()) == pytest.approx(1.0, abs=1e-5)
    assert set(steps[0]["cosine"]) == {"left:right"}
    assert [(row["epoch"], row["mode"]) for row in rows if row["event"] == "epoch"] == [
        (epoch, mode) for epoch in (0, 1) for mode in ("train", "val", "test")
    ]


def test_configuration_is_fully_resolved(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert (config["weighting"], config["arch"], config["encoder"]) == ("MGDA", "HPS", "conv")
    assert config["weight_args"] == {"mgda_gn": "none"}
    assert config["multi_input"] is False


@pytest.mark.slow
def test_configuration_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    assert _train(tmp_path / "again", settings=["--config", str(finished / "config.yaml")]) == 0

    def losses(run: Path) -> list[dict[str, float]]:
        return [row["loss"] for row in read_jsonl(run / "metrics.jsonl") if row["event"] == "steps"]

    assert len(losses(finished)) == 4
    for first, second in zip(losses(finished), losses(tmp_path / "again"), strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def test_a_run_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "last.pt").stat().st_mtime_ns
    assert _train(finished) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (finished / "last.pt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_run_goes_on_for_more_epochs(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert main(["train", "--resume", str(run), "--epochs", "3"]) == 0
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["event"] == "steps"] == [2, 3, 5, 6, 8, 9]
    assert yaml.safe_load((run / "config.yaml").read_text())["epochs"] == 3


@pytest.mark.slow
def test_a_longer_run_follows_its_own_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ["--scheduler", "cos", "--lr", "0.1", "--optim", "sgd", "--limit-batches", "2", "--train-size", "128"]
    options += ["--encoder", "conv"]
    quiet = ["--no-plot", "--no-tensorboard", "--device", "cpu"]
    assert main(["train", "--run-dir", str(run), "--epochs", "2", *options, *quiet]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--epochs", "4"]) == 0
    assert "resume: learning rates and the optimizer's settings are this run's" in capsys.readouterr().out
    state = torch.load(run / "last.pt", weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.0, abs=1e-12)
    assert state["schedule"]["taken"] == {"epoch": 4, "step": 8}
    assert main(["train", "--resume", str(run), "--epochs", "5", "--lr", "0.2", "--resume-schedule", "stored"]) == 0
    assert "whose are kept" in capsys.readouterr().out


def test_what_was_learned_cannot_be_changed_afterwards(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("optim", "sgd"), ("weighting", "ew"), ("arch", "mtan"), ("seed", "3")):
        assert main(["train", "--resume", str(finished), f"--{option}", value]) == 2
        assert capsys.readouterr().err.startswith(f"error: {option} cannot change when a run goes on")


def test_run_without_checkpoint_cannot_go_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished / "config.yaml", tmp_path)
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "has no last.pt to go on from" in capsys.readouterr().err


def test_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    device = f"cuda:{torch.cuda.device_count()}"
    assert main(["train", *SMALL, "--device", device, "--run-dir", str(tmp_path / "run")]) == 2
    assert f"error: device is {device}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_checkpoint_of_another_model(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path / "run", "--arch", "mtan", "--load-path", str(finished)) == 2
    assert "is of another model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    options = ("--arch", "mtan", "--load-path", str(finished), "--epochs", "1", "--limit-batches", "1")
    assert _train(tmp_path / "run", *options, "--no-load-strict") == 0
    assert "Tensors taken: decoders.left 2, decoders.right 2; new: encoder" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["load_strict"] is False


def test_loss_that_becomes_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert _train(run, "--epochs", "1", "--lr", "1e30") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The loss of left, right became NaN or infinite")
    assert error.count("\n") == 1
    assert (run / "train.log").read_text().endswith(error)


def test_loggers_can_be_left_out(tmp_path: Path) -> None:
    assert _train(tmp_path / "run", "--epochs", "1", "--no-plot", "--no-tensorboard") == 0
    assert not (tmp_path / "run" / "curves.png").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.slow
def test_run_directory_is_named_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL, "--epochs", "1", "--dataset", "MultiMNIST-multi", "--device", "cpu"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("multimnist-multi-hps-ew-")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["best", "last"])
@pytest.mark.parametrize("split", ["test", "val"])
def test_eval_gives_the_metrics(
    finished: Path, checkpoint: str, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(finished), "--checkpoint", checkpoint, "--split", split, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["tasks"]) == {"left", "right"}
    assert all(0.0 <= values["Acc"] <= 1.0 and values["loss"] > 0 for values in result["tasks"].values())


def test_eval_agrees_with_what_the_run_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--encoder", "conv", "--train-size", "48", "--batch-size", "16", "--epochs", "1", "--no-plot"]
    assert _train(tmp_path / "run", settings=settings) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)["tasks"]
    (reported,) = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row.get("mode") == "test"]
    for task, values in evaluated.items():
        assert values["loss"] == pytest.approx(reported["loss"][task], rel=1e-4)
        assert values["Acc"] == pytest.approx(reported["metric"][task]["Acc"])


def test_eval_prints_the_metrics(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished)]) == 0
    text = capsys.readouterr().out
    assert "HPS + MGDA" in text
    assert text.count(", Acc 0.") == 2
    assert "Epoch" not in text


@pytest.mark.slow
def test_eval_gives_the_improvement_over_a_baseline(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    assert _train(base, "--seed", "1") == 0
    capsys.readouterr()
    results = {}
    for run in (base, finished):
        assert main(["eval", str(run), "--json", *(["--baseline", str(base)] if run == finished else [])]) == 0
        results[run] = json.loads(capsys.readouterr().out)
    accuracy = {run: [values["Acc"] for values in result["tasks"].values()] for run, result in results.items()}
    gains = [(new - old) / old for old, new in zip(accuracy[base], accuracy[finished], strict=True)]
    assert results[finished]["improvement"] == pytest.approx(sum(gains) / 2)
    assert main(["eval", str(finished), "--baseline", str(finished)]) == 0
    assert f"Improvement over HPS + MGDA from {finished / 'best.pt'}: +0.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--checkpoint", "nowhere.pt"], "There is no checkpoint nowhere.pt"),
        (["--split", "tset"], "Did you mean 'test'?"),
        (["--baseline", "nowhere"], "There is no run directory nowhere."),
    ],
)
def test_eval_errors(finished: Path, more: Sequence[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished), *more]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [
        "--encoder",
        "conv",
        "--train-size",
        "1024",
        "--batch-size",
        "16",
        "--log-every",
        "1",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "fastmtl", "train", *settings, "--epochs", "50", "--run-dir", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while time.monotonic() < end and len(read_jsonl(run / "metrics.jsonl")) < 6:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with `fastmtl train --resume {run}`" in error
    assert "Traceback" not in error
    epochs = max(row["step"] for row in read_jsonl(run / "metrics.jsonl") if row["event"] == "steps") // 64 + 1
    assert main(["train", "--resume", str(run), "--epochs", str(epochs)]) == 0
    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl") if row["event"] == "steps"]
    assert steps == list(range(1, 64 * epochs + 1))


def test_files_that_cannot_be_written_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").touch()
    assert _train(tmp_path) == 1
    wanted = f"error: {tmp_path / 'tensorboard'} cannot be used: File exists (--traceback shows where)\n"
    assert capsys.readouterr().err == wanted
