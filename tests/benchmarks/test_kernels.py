"""The kernel benchmark's files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from fastmtl.benchmarks import runner


@pytest.mark.slow
def test_rows_and_picture(tmp_path: Path) -> None:
    table, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    rows = runner.run_kernels(["gram", "min_norm"], csv_path=table, plot_path=picture, quick=True)
    with table.open() as file:
        found = list(csv.DictReader(file))
    assert [row["op"] for row in found] == [row["op"] for row in rows]
    assert {row["op"] for row in found} == {"gram", "min_norm"}
    for row in found:
        assert (row["share_of_bound"] != "") == (row["op"] == "gram")
        assert (row["share_of_plain"] != "") == (row["op"] == "gram")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rows_outlive_an_interruption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases_of = runner.cases_of

    def once(op: str, *args: Any) -> Any:
        if op == "gram":
            raise KeyboardInterrupt
        return cases_of(op, *args)

    monkeypatch.setattr(runner, "cases_of", once)
    with pytest.raises(KeyboardInterrupt):
        runner.run_kernels(["min_norm", "gram"], csv_path=tmp_path / "rows.csv", quick=True)
    with (tmp_path / "rows.csv").open() as file:
        assert {row["op"] for row in csv.DictReader(file)} == {"min_norm"}


@pytest.mark.slow
def test_gram_is_held_against_the_multiply_adds_too() -> None:
    pytest.importorskip("fastmtl._host", reason="fastmtl._host was not built")
    row = next(row for row in runner.run_kernels(["gram"], quick=True) if row["variant"] == "fastmtl")
    assert row["multiply_adds"] == row["bytes"] // 4 * 2
    assert 0 < row["share_of_arithmetic"] < 1
