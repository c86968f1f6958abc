"""The contracts between the rooms, as ``make lint`` checks them, hold; an import that breaks one is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

ROOT = Path(__file__).parents[1]


def _lint(root: Path) -> subprocess.CompletedProcess[str]:
    command = (
        "import sys; from importlinter.cli import lint_imports_command; sys.path.insert(0, '.'); lint_imports_command()"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", command, "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a folder with a copy of the package's sources."""
    shutil.copytree(ROOT / "fastmtl", tmp_path / "fastmtl", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_the_contracts_hold(copy: Path) -> None:
    done = _lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("room", "wrong"),
    [
        ("engine/graph.py", "from fastmtl.trainer.guard import FiniteGuard"),
        ("engine/comm.py", "from fastmtl.weighting import AbsWeighting"),
        ("engine/comm.py", "from fastmtl.distributed import Peers"),
        ("ops/gram.py", "from fastmtl.engine.vjp import vjp"),
        ("trainer/guard.py", "from fastmtl.trainer.trainer import Trainer"),
        ("weighting/EW.py", "from fastmtl.trainer.state import TrainerState"),
        ("aggregation/base.py", "from fastmtl.autojac import jac"),
    ],
)
@pytest.mark.parametrize("for_types", [False, True])
def test_a_wrong_import_is_found(copy: Path, room: str, wrong: str, for_types: bool) -> None:
    path = copy / "fastmtl" / room
    text = path.read_text(encoding="utf-8")
    planted = f"\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {wrong}\n" if for_types else f"\n{wrong}\n"
    path.write_text(text + planted, encoding="utf-8")
    done = _lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
