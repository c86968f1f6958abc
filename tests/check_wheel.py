"""Installs a wheel into an empty environment and trains with it, where there is no compiler.

    python tests/check_wheel.py dist

takes the wheel of the folder that fits the running Python, and its dependencies by pip. It is a script of its own,
as it runs where this repository's tests cannot: nothing but Python is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
MAIN_JOB = ["train", "--arch", "mtan", "--weighting", "mgda", "--device", "cpu"]
FEW = ["--epochs", "1", "--limit-batches", "2", "--batch-size", "8", "--test-batch-size", "8"]


def fitting(folder: Path) -> Path:
    """Return the wheel for the running Python."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    (wheel,) = folder.glob(f"fastmtl_torch-*-{tag}-{tag}-*.whl")
    return wheel


def installed(wheel: Path, folder: Path, packages: Path | None = None) -> Path:
    """Install a wheel in a new virtual environment; return its folder of programs.

    The dependencies come from ``packages``, another environment's site-packages, or by pip.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet", "--no-cache-dir"]
    if packages is None:
        subprocess.run([*pip, "--constraint", str(CONSTRAINTS), str(wheel)], check=True)
    else:
        subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
        site = next(folder.glob("lib/python*/site-packages"))
        # A path, not a site directory: editable installs of that environment are not seen.
        (site / "outer.pth").write_text(f"{packages}\n")
    return programs


def run(programs: Path, *arguments: str, folder: Path) -> str:
    """Return what the command prints where only the environment's own programs are found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FASTMTL_", "PYTHON", "CXX"))}
    environment = {**kept, "PATH": str(programs)}
    command = [str(programs / "fastmtl"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def backends(programs: Path, folder: Path) -> dict[str, str]:
    """Return the backend of each operator on the CPU, as ``fastmtl doctor`` reports it."""
    report: dict[str, Any] = json.loads(run(programs, "doctor", "--json", folder=folder))
    return {row["op"]: row["backend"] for row in report["ops"] if row["device"] == "cpu"}


def check(wheel: Path, folder: Path, packages: Path | None = None) -> str:
    """Fail unless the wheel trains the main job with compiled kernels; return the log of training."""
    programs = installed(wheel, folder / "environment", packages)
    used = backends(programs, folder)
    slow = {op: backend for op, backend in used.items() if backend != "cpp"}
    if not used or slow:
        raise SystemExit(f"operators that are not compiled: {slow or 'all'}")
    # There is no compiler, so the step runs eagerly, and says so.
    log = run(programs, *MAIN_JOB, *FEW, "--compile", "auto", "--run-dir", str(folder / "run"), folder=folder)
    if "Epoch: 0000 | TRAIN:" not in log or "Plain torch operators" in log:
        raise SystemExit(f"training went otherwise than expected:\n{log}")
    return log


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        wheel = fitting(Path(sys.argv[1]).resolve())
        print(check(wheel, Path(scratch)))
        print(f"{wheel.name} trains without a compiler, with compiled kernels")
