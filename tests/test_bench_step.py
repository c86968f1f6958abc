"""The step benchmark: what it compares is the same step, and a wrong one gets no time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from fastmtl.benchmarks import step as bench
from fastmtl.benchmarks.work import Work
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import UsageError

SMALL: dict[str, Any] = {"net": "mlp", "batch": 4, "seconds": 0.0, "tasks": [2]}


def test_rows_of_all_contenders(tmp_path: Path) -> None:
    table, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    rows = bench.run_step(["mgda", "EW"], csv_path=table, plot_path=picture, **SMALL)
    assert [(row["strategy"], row["library"]) for row in rows] == [
        (name, library) for name in ("MGDA", "EW") for library in ("fastmtl", "floor", "sum")
    ]
    for row in rows:
        assert row["median_ms"] > 0
        assert row["times_floor"] > 0
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert picture.stat().st_size > 0
    # Parameters have gradients of their own size at least.
    parameters = sum(param.numel() for param in Work(**_work()).modules()[0].parameters())
    assert all(row["peak_mb"] > 4e-6 * parameters for row in rows)


def _work() -> dict[str, Any]:
    return {"net": "mlp", "arch": "HPS", "count": 2, "batch": 4, "size": 1, "device": torch.device("cpu")}


def test_updates_agree_with_torchjds() -> None:
    pytest.importorskip("torchjd")
    rows = bench.run_step(["MGDA", "UPGrad"], ["torchjd"], **SMALL)
    assert all(row["distance"] < 1e-2 for row in rows if row["library"] == "TorchJD")


def test_a_wrong_update_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchjd")

    def wrong(gram: Tensor) -> Tensor:
        return torch.arange(len(gram), dtype=gram.dtype)

    monkeypatch.setattr(ops, "min_norm", wrong)
    rows = bench.run_step(["MGDA"], ["torchjd"], **SMALL)
    assert ["median_ms" in row for row in rows if row["library"] == "fastmtl"] == [False]


def test_a_peer_without_the_strategy_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "LibMTL").mkdir()
    rows = bench.run_step(["SI"], ["libmtl", "torchjd"], tmp_path, **SMALL)
    assert [row["library"] for row in rows] == ["fastmtl", "floor", "sum"]
    printed = capsys.readouterr().out
    assert "libmtl has no such step on HPS" in printed
    assert "torchjd has no such step on HPS" in printed


def test_rows_outlive_an_interruption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compare = bench._compare

    def once(name: str, *args: Any) -> list[Any]:
        if name == "EW":
            raise KeyboardInterrupt
        return compare(name, *args)

    monkeypatch.setattr(bench, "_compare", once)
    with pytest.raises(KeyboardInterrupt):
        bench.run_step(["MGDA", "EW"], csv_path=tmp_path / "rows.csv", **SMALL)
    with (tmp_path / "rows.csv").open() as file:
        assert {row["strategy"] for row in csv.DictReader(file)} == {"MGDA"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ["libmtl"]}, "needs the folder of a LibMTL checkout"),
        ({"peers": ["libmtl"], "libmtl": Path("nowhere")}, "There is no LibMTL in nowhere"),
        ({"peers": ["torchjdd"]}, "peer"),
        ({"net": "vgg"}, "net must be one of resnet18, mlp"),
        ({"arch": "HPPS"}, "architecture"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench.run_step(["MGDA"], **{**SMALL, **options})
