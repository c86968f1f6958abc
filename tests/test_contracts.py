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


@pytest.mark.parametrize("for_types", [False, True])
def test_wrong_imports_are_found(copy: Path, for_types: bool) -> None:
    wrong = {
        "engine.graph -> fastmtl.trainer.guard": "from fastmtl.trainer.guard import FiniteGuard",
        "engine.comm -> fastmtl.weighting": "from fastmtl.weighting import AbsWeighting",
        "engine.comm -> fastmtl.distributed": "from fastmtl.distributed import Peers",
        "ops.gram -> fastmtl.engine.vjp": "from fastmtl.engine.vjp import vjp",
        "weighting.EW -> fastmtl.trainer.state": "from fastmtl.trainer.state import TrainerState",
        "aggregation.base -> fastmtl.autojac.jac": "from fastmtl.autojac import jac",
        # Within the trainer, whose circles are reported by the names of its parts.
        "trainer.guard -> .trainer": "from fastmtl.trainer.trainer import Trainer",
    }
    for name, line in wrong.items():
        path = copy / "fastmtl" / (name.split(" ")[0].replace(".", "/") + ".py")
        planted = f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}" if for_types else line
        path.write_text(f"{path.read_text(encoding='utf-8')}\n{planted}\n", encoding="utf-8")
    done = _lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    for name in wrong:
        assert name.removeprefix("trainer") + " (" in done.stdout
