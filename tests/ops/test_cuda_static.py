"""What nvcc makes of the CUDA kernels: no spills, wide loads, the units that were meant, and the committed table."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from fastmtl.benchmarks.gpu import static


@pytest.fixture(scope="module")
def rows() -> list[static.Row]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    # One source is compiled even if nothing has changed.
    table = [row for row in static.read_table() if row["source"] != "pcgrad.cu"]
    return static.measure(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1), table)


@pytest.mark.slow
def test_no_kernel_breaks_the_rules(rows: list[static.Row]) -> None:
    assert static.broken_rules(rows) == []


@pytest.mark.slow
def test_every_source_and_architecture_is_measured(rows: list[static.Row]) -> None:
    sources = {path.name for path in (static.ROOT / "kernels").glob("*.cu")} - {"register.cu"}
    assert {(row["source"], row["arch"]) for row in rows} == {(s, a) for s in sources for a in static.ARCHITECTURES}


@pytest.mark.slow
def test_the_table_is_what_the_compiler_makes(rows: list[static.Row]) -> None:
    assert static.differences(rows, static.read_table()) == []


def test_the_committed_table_keeps_the_rules() -> None:
    table = static.read_table()
    assert {row["source"] for row in table} >= {"gram.cu", "combine.cu", "min_norm.cu"}
    assert static.broken_rules(table) == []


def test_only_what_has_changed_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def refuse(source: Path, arch: str) -> tuple[Path, str]:
        asked.append((source.name, arch))
        raise static.StaticError("compiled")

    monkeypatch.setattr(static, "BUILD", tmp_path / "build")
    monkeypatch.setattr(static, "_compile", refuse)
    monkeypatch.setattr(static, "_tool", lambda name: name)
    monkeypatch.setattr(static, "_run", lambda command: f"release {static.read_table()[0]['nvcc']}, ")
    table = static.read_table()
    assert static.differences(static.measure(1, table), table) == []
    older = [row | {"digest": "0"} if row["source"] == "gram.cu" else row for row in table]
    with pytest.raises(static.StaticError, match="compiled"):
        static.measure(1, older)
    assert set(asked) == {("gram.cu", arch) for arch in static.ARCHITECTURES}
    with pytest.raises(static.StaticError, match="compiled"):
        static.measure(1, [row | {"nvcc": "12.0"} for row in table])
    assert {source for source, _ in asked} == {row["source"] for row in table}


def test_a_change_is_named() -> None:
    table = static.read_table()
    worse = [dict(row) for row in table]
    worse[0]["registers"] = "1000"
    assert any("registers" in said and "1000" in said for said in static.differences(worse, table))
    assert static.differences(worse[1:], table) == [f"{table[0]['kernel']} for sm_{table[0]['arch']} is gone."]


@pytest.mark.parametrize(
    ("kernel", "change", "words"),
    [
        ("gram_tile_kernel<float, 2>", {"spill_loads": "4"}, "spills"),
        ("gram_tile_kernel<float, 2>", {"local": "1"}, "local memory"),
        ("combine_kernel<float, true>", {"loads_128": "0"}, "loads of 128 bits"),
        ("combine_kernel<float, true>", {"stores_128": "0"}, "stores of 128 bits"),
        ("combine_kernel<float, true>", {"float64": "3"}, "float64"),
        ("graddrop_rows_kernel<float>", {"stores_128": "0"}, "stores of 128 bits"),
        ("gram_matrix_kernel<float, 4>", {"local": "1"}, "local memory"),
        ("gram_matrix_kernel<float, 4>", {"matrix": "0"}, "tensor cores"),
    ],
)
def test_each_rule_is_seen_to_be_broken(kernel: str, change: dict[str, str], words: str) -> None:
    row = next(row for row in static.read_table() if row["kernel"] == kernel)
    assert any(words in said for said in static.broken_rules([row | change]))


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(static.StaticError, match="nvcc was not found"):
        static.measure()
