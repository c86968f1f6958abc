"""What runs on a GPU machine, as far as a CPU can show it: the script's dry run, and what it picks and checks."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from fastmtl.benchmarks.gpu.environment import environment
from fastmtl.benchmarks.gpu.once import once
from fastmtl.benchmarks.gpu.slowest import slowest
from fastmtl.benchmarks.gpu.small import cases, check

from fastmtl import ops
from fastmtl.cli.bench_commands import bench
from fastmtl.errors import BackendError
from fastmtl.ops._registry import OPS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.sh"
PARTS = ["build", "small", "kernels", "step", "capture", "tests", "compiled", "triton", "memcheck", "profile"]
SYSTEM = "/usr/local/bin:/usr/bin:/bin"
# In the place of Python and of NVIDIA's tools: notes how it was called, leaves the table it was asked for, and hangs or
# fails where the test wants it to.
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in
  *get_device_name*) echo stub; exit ;;
  *gpu.slowest*) echo gram; exit ;;
esac
[ -n "$HANGS" ] && [[ "$*" == *"$HANGS"* ]] && echo $$ >"$CALLS.hangs" && exec sleep 60
[ -n "$FAILS" ] && [[ "$*" == *"$FAILS"* ]] && exit 3
[[ "$*" =~ --csv\\ ([^ ]+) ]] && echo row >"${BASH_REMATCH[1]}"
[[ "$*" == *memcheck* ]] && echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"
exit 0
"""


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": SYSTEM, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=variables | changes, capture_output=True, text=True, check=False
    )


def read(archive: Path) -> dict[str, str]:
    """Return the texts of an archive by name."""
    with tarfile.open(archive) as files:
        texts = {Path(member.name).name: files.extractfile(member) for member in files if member.isfile()}
        return {name: text.read().decode() for name, text in texts.items() if text is not None}


def fates(archive: Path) -> dict[str, str]:
    """Return how each step ended, in their order."""
    return {row["step"]: row["exit"] for row in csv.DictReader(io.StringIO(read(archive)["status.csv"]))}


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """Return variables with which no part computes anything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "ncu", "compute-sanitizer"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    calls = str(tmp_path / "calls")
    return {"PYTHON": str(folder / "python"), "PATH": f"{folder}:{SYSTEM}", "CALLS": calls, "HANGS": "", "FAILS": ""}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the archive of a real dry run of two parts."""
    archive = tmp_path_factory.mktemp("dry") / "results.tar.gz"
    only = ("--only", "build", "--only", "capture")
    done = run("--dry-run", *only, "--out", str(archive), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return archive


@pytest.mark.slow
def test_dry_run_leaves_a_whole_archive(dry: Path) -> None:
    assert fates(dry) == {"build": "0", "environment": "0", "capture": "0"}
    texts = read(dry)
    assert json.loads(texts["environment.json"])["commit"]
    # Without a GPU the cases that want one are found, and skipped.
    assert "<testsuite" in texts["capture.xml"]
    assert "test_capture.py" in texts["capture.log"]
    assert "test_strategies.py" in texts["capture.log"]


@pytest.mark.slow
def test_an_archive_is_continued_and_a_failure_shows(dry: Path, stubs: dict[str, str], tmp_path: Path) -> None:
    archive = tmp_path / "results.tar.gz"
    archive.write_bytes(dry.read_bytes())
    done = run("--dry-run", "--only", "kernels", "--out", str(archive), **stubs | {"FAILS": "bench kernels"})
    assert done.returncode == 1
    assert "failed with 3" in done.stdout
    assert fates(archive) == fates(dry) | {"kernels": "3"}
    assert read(archive)["environment.json"] == read(dry)["environment.json"]


def commands(stubs: dict[str, str]) -> list[list[str]]:
    """Return the arguments of Python, in order."""
    lines = map(shlex.split, Path(stubs["CALLS"]).read_text().splitlines())
    return [words[1:] for words in lines if words[0] == "python" and words[1] == "-m"]


@pytest.mark.parametrize("kind", ["--dry-run", "--prebuilt"])
def test_every_command_can_be_called_like_that(kind: str, stubs: dict[str, str], tmp_path: Path) -> None:
    assert run(kind, "--out", str(tmp_path / "results.tar.gz"), "--libmtl", str(tmp_path), **stubs).returncode == 0
    for _, module, *arguments in commands(stubs):
        assert importlib.util.find_spec(module) is not None
        if module == "fastmtl" and arguments[0] == "bench":
            group: Any = typer.main.get_command(bench)
            group.commands[arguments[1]].make_context(arguments[1], arguments[2:])
        elif module == "pytest":
            paths = [word for word in arguments if word.startswith("tests/")]
            assert paths
            assert all((ROOT / path).exists() for path in paths)


def test_the_smallest_cases_run(stubs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--dry-run", "--only", "small", "--out", str(tmp_path / "results.tar.gz"), **stubs)
    ((_, module, *arguments),) = commands(stubs)
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--op", "min_norm"])
    monkeypatch.delitem(sys.modules, module)
    runpy.run_module(module, run_name="__main__")


def test_the_most_valuable_comes_first(stubs: dict[str, str], tmp_path: Path) -> None:
    archive = tmp_path / "results.tar.gz"
    done = run("--out", str(archive), "--libmtl", "there", **stubs)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = ["build", "environment", "doctor", "small", "kernels", "step-MGDA", "step-MGDA-bf16", "step-PCGrad"]
    steps += ["step-MGDA-mlp", "step-MGDA-mtan", "capture", "tests", "step-MGDA-compiled", "small-triton"]
    steps += ["kernels-triton", "tests-triton", "memcheck", "racecheck", "profile-gram"]
    assert list(fates(archive)) == steps
    assert set(fates(archive).values()) == {"0"}
    calls = Path(stubs["CALLS"]).read_text()
    assert "bench kernels --device cuda" in calls
    assert "--op gram --op combine --op min_norm --op pcgrad" in calls
    assert "--peer libmtl --libmtl there --peer torchjd" in calls
    assert "--maxfail=20 --tb=short -W default" in calls
    assert "-n 8" in calls
    assert "caching off: 1" in read(archive)["memcheck.log"]
    assert "--clock-control none --profile-from-start off --kernel-name regex:gram_|combine_|solve_" in calls
    assert not list(tmp_path.glob("results.tar.gz.*"))


def test_what_was_built_elsewhere_is_taken_as_it_is(stubs: dict[str, str], tmp_path: Path) -> None:
    archive = tmp_path / "results.tar.gz"
    done = run("--out", str(archive), "--prebuilt", "--only", "build", "--only", "capture", **stubs)
    assert done.returncode == 0
    assert fates(archive)["build"] == "left out: --prebuilt"
    assert "pip install" not in Path(stubs["CALLS"]).read_text()
    assert fates(archive)["capture"] == "0"


def test_a_part_that_hangs_loses_only_itself(stubs: dict[str, str], tmp_path: Path) -> None:
    # A second takes the place of every limit.
    timeout = Path(stubs["PYTHON"]).with_name("timeout")
    timeout.write_text('#!/usr/bin/env bash\nexec /usr/bin/timeout "$1" "$2" 1 "${@:4}"\n')
    timeout.chmod(0o755)
    archive = tmp_path / "results.tar.gz"
    done = run("--out", str(archive), "--only", "small", "--only", "kernels", **stubs | {"HANGS": "gpu.small"})
    assert done.returncode == 1
    assert fates(archive) == {"small": "124", "kernels": "0"}
    assert read(archive)["kernels.csv"] == "row\n"


def test_nothing_runs_beyond_the_deadline(stubs: dict[str, str], tmp_path: Path) -> None:
    archive = tmp_path / "results.tar.gz"
    done = run("--out", str(archive), "--deadline", "2", **stubs | {"HANGS": "gpu.small --device cuda"})
    assert done.returncode == 1
    ends = fates(archive)
    assert (ends["environment"], ends["small"]) == ("0", "124")
    assert ends["kernels"] == ends["capture"] == ends["memcheck"] == "left out: the deadline of 2 s has passed"


def test_what_is_done_outlasts_the_script(stubs: dict[str, str], tmp_path: Path) -> None:
    archive = tmp_path / "results.tar.gz"
    variables = stubs | {"HANGS": "gpu.small", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        ["bash", str(SCRIPT), "--out", str(archive)],
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        assert running.stdout is not None
        assert "== small\n" in running.stdout
        hanging = Path(f"{stubs['CALLS']}.hangs")
        while not hanging.is_file() or not hanging.read_text():
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGKILL)
    os.kill(int(hanging.read_text()), signal.SIGKILL)
    assert list(fates(archive)) == ["build", "environment", "doctor"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "all"), f"--only must be one of {' '.join(PARTS)}, got all"),
        (("--deadline", "soon"), "--deadline must be a number of seconds, got soon"),
        (("--fast",), "unknown argument --fast"),
        (("--out",), "--out needs a value"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    "message",
    [
        "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context...",
        "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled.",
    ],
)
def test_what_torch_warns_of_on_a_gpu_is_no_error(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=1)


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


def test_small_cases_of_one_backend_are_those_of_the_ops_it_has() -> None:
    def only_min_norm(op: str, backend: str) -> Callable[..., Any]:
        if (op, backend) in (("min_norm", "triton"), ("min_norm", "reference")):
            return OPS[op]
        raise BackendError("not there")

    with mock.patch("fastmtl.benchmarks.gpu.small.ops.implementation", only_min_norm):
        assert check(torch.device("cpu"), backend="triton") == 3


def test_a_profiler_sees_one_call_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def profile() -> Iterator[None]:
        seen.append("begin")
        yield
        seen.append("end")

    right = ops.min_norm

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append("call")
        return right(*arguments, **options)

    monkeypatch.setattr(torch.cuda.profiler, "profile", profile)
    monkeypatch.setattr(ops, "min_norm", counted)
    once("min_norm", torch.device("cpu"))
    assert seen[:4] == ["call", "begin", "call", "end"]
    assert len(seen) % 4 == 0


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
