"""The benchmark of autojac: both libraries compute the same gradient, and a wrong one gets no time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from fastmtl.benchmarks.autojac import run_autojac
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import UsageError

SMALL: dict[str, Any] = {"net": "mlp", "batch": 4, "seconds": 0.0}


def test_both_are_timed_on_the_same_gradient(tmp_path: Path) -> None:
    pytest.importorskip("torchjd")
    table = tmp_path / "rows.csv"
    rows = run_autojac([2, 9], csv_path=table, **SMALL)
    assert [(row["tasks"], row["library"]) for row in rows] == [
        (count, library) for count in (2, 9) for library in ("fastmtl", "torchjd")
    ]
    assert all(row["distance"] < 1e-3 and row["median_ms"] > 0 and row["peak_mb"] > 0 for row in rows)
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_a_wrong_gradient_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchjd")

    def wrong(gram: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.arange(len(gram), dtype=gram.dtype)

    monkeypatch.setattr(ops, "min_norm", wrong)
    rows = run_autojac([2], aggregator="MGDA", **SMALL)
    assert ["median_ms" in row for row in rows] == [False, True]


def test_an_unknown_aggregator_is_refused() -> None:
    with pytest.raises(UsageError, match="aggregator must be one of"):
        run_autojac([2], aggregator="UpGrad", **SMALL)
