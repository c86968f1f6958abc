"""Experiments that train: to the end, after a stop, with failures; on data of one's own and with the command."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import fastmtl
from fastmtl.cli import main
from fastmtl.errors import UsageError
from fastmtl.experiments import Problem, Results
from fastmtl.experiments.reading import is_finished, read_run
from fastmtl.experiments.runner import reason_of, start
from fastmtl.experiments.worker import ORPHANED
from fastmtl.trainer.log.jsonl import read_jsonl
from fastmtl.weighting import EW
from tests.experiments.made import make_data

pytestmark = pytest.mark.usefixtures("undrawn_in_module")

_COSTS = ["seconds_per_step", "seconds_per_epoch", "peak_memory_mb"]


class Louder(EW):
    """A strategy of one's own."""


def _compare(out: Path, **changes: Any) -> Results:
    about: dict[str, Any] = {"weightings": ["EW", "MGDA"], "seeds": 2, "epochs": 2, "jobs": 0, "log_every": 2}
    return fastmtl.compare(make_data, out=out, **{**about, **changes})


def _numbers(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "results.csv", dtype=str).drop(columns=_COSTS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, undrawn_in_module: None) -> tuple[Path, Results]:
    out = tmp_path_factory.mktemp("experiments") / "all"
    return out, _compare(out)


def test_a_comparison_returns_its_numbers(finished: tuple[Path, Results]) -> None:
    out, results = finished
    assert list(results.table.index) == ["STL", "EW", "MGDA"]
    assert results.missing == []
    assert results.table.loc["STL", ("all", "delta_m")] == pytest.approx(0, abs=1e-9)
    assert len(results.runs) == 6
    assert all((out / name).exists() for name in ("report.html", "results.csv", "results.md", "table.tex"))
    runs = sorted(path.name for path in (out / "cells").iterdir() if not path.name.startswith("."))
    assert runs == [f"{name}-s{seed}" for name in ("hps-ew", "hps-mgda", "stl-ew") for seed in (0, 1)]


def test_each_cell_is_an_ordinary_run_folder(finished: tuple[Path, Results]) -> None:
    run = read_run(finished[0] / "cells" / "hps-mgda-s1")
    assert (run.finished, run.seed, run.weighting, run.dataset) == (True, 1, "MGDA", "vectors")
    assert {"best.pt", "last.pt", "train.log"} <= {path.name for path in run.path.iterdir()}
    assert run.made_with["torch"] == torch.__version__
    assert run.peak_memory is not None


def test_what_is_done_stays(finished: tuple[Path, Results]) -> None:
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/last.pt")}
    _compare(out)
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/last.pt")} == before


def test_a_stopped_experiment_goes_on_to_the_same_numbers(finished: tuple[Path, Results], tmp_path: Path) -> None:
    """One cell has its first epoch done, one has begun, others are new."""
    whole, _ = finished
    out = tmp_path / "half"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "cells" / "stl-ew-s1")
    begun, half = out / "cells" / "hps-ew-s0", out / "cells" / "hps-mgda-s1"
    for name in ("last.pt", "best.pt"):
        (begun / name).unlink()
    shutil.rmtree(half)
    _compare(tmp_path / "short", epochs=2, weightings=["MGDA"], seeds=[1], stl=False, checkpoint_every=1)
    shutil.copytree(tmp_path / "short" / "cells" / "hps-mgda-s1", half)
    rows = read_jsonl(half / "metrics.jsonl")
    state = torch.load(half / "last.pt", weights_only=True)
    assert state["epoch"] == 2
    # As after a kill in the middle of the first epoch: no checkpoint, a torn line.
    (half / "last.pt").unlink()
    text = "".join(json.dumps(row) + "\n" for row in rows[:3]) + '{"event": "st'
    (half / "metrics.jsonl").write_text(text)
    _compare(out)
    pd.testing.assert_frame_equal(_numbers(out), _numbers(whole))


def test_methods_and_seeds_may_be_added_but_settings_not_changed(
    finished: tuple[Path, Results], tmp_path: Path
) -> None:
    out = tmp_path / "more"
    shutil.copytree(finished[0], out)
    results = _compare(out, weightings=["EW", "MGDA", Louder, {"name": "CAGrad", "calpha": 0.2}], seeds=[0])
    assert list(results.table.index) == ["STL", "EW", "MGDA", "Louder", "CAGrad"]
    assert results.table.loc["Louder", ("kind", "Acc")] == results.runs.loc[("EW", 0), ("kind", "Acc")]
    with pytest.raises(UsageError, match="holds an experiment with epochs = 2, not 3"):
        _compare(out, epochs=3)


def test_a_failed_cell_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    results = _compare(tmp_path, weightings=["GradDrop", "EW"], seeds=1)
    assert len(results.missing) == 1
    assert "HPS GradDrop, seed 0: GradDrop works on the gradients of representations" in results.missing[0]
    assert list(results.table.index) == ["STL", "EW"]


def test_runs_that_become_nan_say_so(tmp_path: Path) -> None:
    def exploding(seed: int) -> Problem:
        problem = make_data(seed)
        problem.task_dict["size"]["loss_fn"] = lambda pred, gt: (pred - gt).square().mean() * float("inf")
        return problem

    with pytest.raises(UsageError, match="holds no finished run: The loss of size became NaN"):
        fastmtl.compare(exploding, out=tmp_path, seeds=1, jobs=0, stl=False)


def test_tuning_chooses_on_the_validation_split(tmp_path: Path) -> None:
    results = _compare(tmp_path, weightings=["EW"], seeds=1, stl=False, tune={"lr": [1e-9, 1e-2]}, last=1)
    assert results.missing == []
    assert read_run(tmp_path / "cells" / "hps-ew-s0").config["lr"] == 1e-2
    text = (tmp_path / "results.md").read_text()
    assert "same tuning budget: 2 runs of full length with seed 1" in text
    assert "| hps-ew | lr=0.01 |" in text


def test_tuning_without_a_validation_split_is_refused(tmp_path: Path) -> None:
    def without_val(seed: int) -> Problem:
        return replace(make_data(seed), val=None)

    with pytest.raises(UsageError, match="validation split, which the data of make_data do not have"):
        fastmtl.compare(without_val, out=tmp_path, jobs=0, tune={"lr": [1e-2, 1e-3]})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 3}, "batch_size is for make_data to decide"),
        ({"weightings": ["EW", "Nash"]}, "Did you mean 'Nash_MTL'"),
        ({"last": 0}, "last must be at least 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        _compare(tmp_path / "out", **changes)


def test_data_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"make_data must return a fastmtl\.experiments\.Problem"):
        fastmtl.compare(lambda seed: {}, out=tmp_path, seeds=1, jobs=0, stl=False)  # type: ignore[return-value]


def test_reasons_are_sentences_for_people() -> None:
    assert reason_of(0, []) is None
    assert reason_of(130, ["interrupted"]) is None
    assert reason_of(2, ["Warning: x", "error: EW refuses."]) == "refused: EW refuses."
    assert "short" in str(reason_of(-signal.SIGKILL, []))
    assert reason_of(1, ["error: OutOfMemoryError: CUDA (--traceback shows where)"]) == "OutOfMemoryError: CUDA"


@pytest.mark.slow
def test_cells_in_processes_of_their_own_agree(finished: tuple[Path, Results], tmp_path: Path) -> None:
    """Functions and classes of the script go with them."""
    results = _compare(tmp_path, weightings=[Louder], seeds=1, jobs=2, stl=False)
    expected = finished[1].runs.loc[("EW", 0), [("kind", "Acc"), ("size", "L1")]]
    got = results.runs.loc[("Louder", 0), [("kind", "Acc"), ("size", "L1")]]
    assert got.tolist() == pytest.approx(expected.tolist())


@pytest.mark.slow
def test_a_worker_ends_with_the_one_who_started_it(tmp_path: Path) -> None:
    # It waits for the lock of its folder, which is held here, until it finds itself alone.
    with (tmp_path / ".run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(["train", "absent.yaml", str(tmp_path / "run"), ""], 1)
        assert process.stdin is not None
        assert process.stderr is not None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        process.stdin.close()
        assert process.wait(timeout=60) == ORPHANED
        process.stderr.close()


@pytest.mark.slow
def test_the_command_survives_kill_to_the_last_digit(tmp_path: Path) -> None:
    arguments = [
        *("--dataset", "multimnist", "--encoder", "conv", "--weighting", "EW", "MGDA", "--seeds", "1"),
        *("--epochs", "2", "--train-size", "64", "--batch-size", "16", "--limit-batches", "4", "--no-stl"),
    ]
    assert main(["compare", *arguments, "--out", str(tmp_path / "whole"), "--jobs", "0"]) == 0
    command = [sys.executable, "-m", "fastmtl", "compare", *arguments, "--out", str(tmp_path / "killed"), "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/cells/*/last.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(_numbers(tmp_path / "killed"), _numbers(tmp_path / "whole"))
    assert is_finished(tmp_path / "killed" / "cells" / "hps-mgda-s0", 2)


@pytest.mark.slow
def test_runs_that_stop_early_are_done(tmp_path: Path) -> None:
    results = _compare(tmp_path, epochs=30, early_stopping=1, lr=0.5, seeds=1, stl=False)
    assert set(_numbers(tmp_path)["status"]) == {"done"}
    for cell in ("hps-ew-s0", "hps-mgda-s0"):
        run = read_run(tmp_path / "cells" / cell)
        assert 2 <= len(run.scores["test"]) < 30
        assert is_finished(run.path, 30)
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
        (run.path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if '"stop"' not in line))
        assert not is_finished(run.path, 30)
    assert not results.missing


@pytest.mark.slow
def test_a_ray_cluster_runs_the_cells(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    arguments = [
        *("--dataset", "multimnist", "--encoder", "conv", "--weighting", "EW", "PCGrad", "--seeds", "1"),
        *("--train-size", "64", "--batch-size", "16", "--limit-batches", "2", "--ray", "local", "--no-stl"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "fastmtl", "compare", *arguments, "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(_numbers(tmp_path)["status"]) == {"done"}
