"""The benchmark of tables: every contender is timed behind a gate, and wrong gradients get no time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from fastmtl.benchmarks.sparse import run_sparse
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import UsageError

SMALL: dict[str, Any] = {"rows": [300], "batch": 4, "ids": 3, "dim": 5, "seconds": 0.0}


@pytest.mark.parametrize("dense", [False, True])
def test_every_contender_is_timed(dense: bool, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    optims = ["sgd"] if dense else ["sgd", "sparseadam"]
    rows = run_sparse(optims=optims, strategies=["EW", "MGDA"], dense=dense, csv_path=table, **SMALL)
    assert [(row["optim"], row["contender"]) for row in rows] == [
        (optim, name) for optim in optims for name in ("plain loop", "floor", "plain loop, huge pages", "EW", "MGDA")
    ]
    assert all(row["median_ms"] > 0 for row in rows)
    assert {row.get("beside") for row in rows} == {None, "plain loop", "floor"}
    assert all(row["distance"] < 1e-5 for row in rows if "beside" in row)
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_a_wrong_gradient_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.sum_rows

    def wrong(*arguments: Any) -> list[Tensor]:
        return [total * 1.01 for total in real(*arguments)]

    monkeypatch.setattr(ops, "sum_rows", wrong)
    rows = run_sparse(optims=["sgd"], strategies=["EW", "MGDA"], **SMALL)
    assert [row["contender"] for row in rows if "median_ms" not in row] == ["MGDA"]


def test_an_optimizer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="optim must be sgd here, got 'sparseadam'"):
        run_sparse(dense=True, **SMALL)
    with pytest.raises(UsageError, match="optim must be sgd or sparseadam here, got 'adam'"):
        run_sparse(optims=["adam"], **SMALL)
    assert torch.is_grad_enabled()
