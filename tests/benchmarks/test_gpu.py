"""What runs on a GPU machine, as far as a CPU can show it: the script's dry run, and what it picks and checks."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fastmtl.benchmarks.gpu.environment import environment
from fastmtl.benchmarks.gpu.slowest import slowest
from fastmtl.benchmarks.gpu.small import cases, check

from fastmtl import ops
from fastmtl.ops._registry import OPS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_dry_run_leaves_a_whole_folder_of_results(tmp_path: Path) -> None:
    done = run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "environment.json").read_text())["commit"]
    with (tmp_path / "status.csv").open(newline="") as file:
        steps = {row["step"]: row["exit"] for row in csv.DictReader(file)}
    assert steps["tests"] == steps["small"] == steps["kernels-min_norm"] == "0"
    with (tmp_path / "kernels-min_norm.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"min_norm"}
    assert all(row["median_us"] for row in rows if row["variant"] == "fastmtl")


@pytest.mark.slow
def test_parts_can_be_run_alone_and_a_failure_shows(tmp_path: Path) -> None:
    done = run("--dry-run", "--only", "profile", "--out", str(tmp_path))
    assert done.returncode == 0
    assert "profile left out" in done.stdout
    assert not list(tmp_path.glob("kernels*"))
    broken = run("--dry-run", "--only", "kernels", "--device", "meta", "--out", str(tmp_path))
    assert broken.returncode != 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "all"), "--only must be build, tests, kernels, step or profile, got all"),
        (("--fast",), "unknown argument --fast"),
        (("--out",), "--out needs a value"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_small_cases_cover_every_op_but_those_that_write() -> None:
    covered = {name for name, _ in cases(torch.device("cpu"))}
    assert {name for name in OPS if not name.endswith("_")} <= covered <= set(OPS)


def test_small_cases_are_checked() -> None:
    assert check(torch.device("cpu"), "min_norm") == 3
    right = ops.implementation("min_norm", "reference")

    def wrong(*arguments: Any) -> torch.Tensor:
        result: torch.Tensor = right(*arguments) + 0.1
        return result

    with (
        mock.patch("fastmtl.benchmarks.gpu.small.ops.implementation", return_value=wrong),
        pytest.raises(AssertionError),
    ):
        check(torch.device("cpu"), "min_norm")


def test_the_slowest_are_those_furthest_from_the_bound() -> None:
    rows = [
        {"op": "gram", "variant": "fastmtl", "share_of_bound": "0.9"},
        {"op": "gram", "variant": "fastmtl", "share_of_bound": "0.5"},
        {"op": "combine", "variant": "fastmtl in place", "share_of_bound": "0.7"},
        {"op": "other", "variant": "fastmtl", "share_of_bound": "0.8"},
        {"op": "other", "variant": "torch", "share_of_bound": "0.1"},
        {"op": "min_norm", "variant": "fastmtl", "share_of_bound": ""},
    ]
    assert slowest(rows) == ["gram", "combine"]


def test_environment_names_versions() -> None:
    known = environment(torch.device("cpu"))
    assert known["torch"] == torch.__version__
    assert json.dumps(known)
