"""The benchmark of the engine: both ways compute the same Gram matrix, and a wrong one gets no time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from fastmtl.benchmarks.engine import run_engine
from torch import Tensor

from fastmtl.autogram import Engine
from fastmtl.cli import main

SMALL: dict[str, Any] = {"batch": 4, "seconds": 0.0}


def test_both_ways_are_timed(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    rows = run_engine([2, 9], csv_path=table, **SMALL)
    assert [(row["tasks"], row["way"]) for row in rows] == [
        (count, way) for count in (2, 9) for way in ("engine", "rows")
    ]
    assert all(row["distance"] < 1e-5 and row["median_ms"] > 0 and row["peak_mb"] > 0 for row in rows)
    assert all(row["times_rows"] == 1 for row in rows if row["way"] == "rows")
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_a_wrong_matrix_gets_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = Engine.compute_gramian

    def wrong(engine: Engine, output: Tensor) -> Tensor:
        return real(engine, output) * 1.001

    monkeypatch.setattr(Engine, "compute_gramian", wrong)
    assert main(["bench", "engine", "--tasks", "2", "--batch", "4", "--seconds", "0"]) == 1
    assert "WRONG: 1e-03 from the rows' matrix; not timed" in capsys.readouterr().out
