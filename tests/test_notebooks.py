"""The notebooks run from top to bottom, and show what is stored in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.notebooks import NOTEBOOKS, cells, masked, run

QUICK = ("conflicts",)


def _compare(notebook: Path) -> None:
    stored = [masked(cell["outputs"]) for cell in cells(notebook)]
    assert any(stored)
    assert [masked(outputs) for outputs in run(notebook)] == stored, "python -m tests.notebooks"


@pytest.mark.parametrize("name", QUICK)
def test_a_notebook_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    _compare(next(notebook for notebook in NOTEBOOKS if notebook.stem == name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS if path.stem not in QUICK])
def test_a_longer_notebook_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    _compare(next(notebook for notebook in NOTEBOOKS if notebook.stem == name))
