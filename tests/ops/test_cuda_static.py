"""What nvcc makes of the CUDA kernels: no spills, wide loads, the units that were meant, and the committed table."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from fastmtl.benchmarks.gpu import static
from fastmtl.benchmarks.gpu.sass import loads_under_way


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
    monkeypatch.setattr(static, "compile_source", refuse)
    monkeypatch.setattr(static, "tool", lambda name: name)
    monkeypatch.setattr(static, "run_tool", lambda command: f"release {static.read_table()[0]['nvcc']}, ")
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
        ("gram_reduce_kernel", {"unresolved": "torch_new_one"}, "gram.cu takes from torch what symbols.csv has not"),
        ("ema_gram_tile_kernel<8>", {"under_way": "8192"}, "8192 bytes of loads under way"),
        ("gram_matrix_kernel<float, 4>", {"local": "1"}, "local memory"),
        ("gram_matrix_kernel<float, 4>", {"matrix": "0"}, "tensor cores"),
    ],
)
def test_each_rule_is_seen_to_be_broken(kernel: str, change: dict[str, str], words: str) -> None:
    row = next(row for row in static.read_table() if row["kernel"] == kernel)
    assert any(words in said for said in static.broken_rules([row | change]))


def code(*instructions: str) -> str:
    """Return machine code as cuobjdump prints it."""
    lines = [f"        /*{16 * place:04x}*/                   {text} ;" for place, text in enumerate(instructions)]
    return "\n".join(["\t\tFunction : kernel", *lines])


@pytest.mark.parametrize(
    ("instructions", "most"),
    [
        (["LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]", "FADD R4, R4, R9"], 2),
        # A store of what was loaded waits for it, so the next load is alone.
        (["LDG.E.128 R4, [R2.64]", "STG.E.128 desc[UR4][R2.64], R4", "LDG.E.128 R8, [R2.64+0x10]"], 1),
        (["LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "@P0 LDG.E.128.STRONG.SYS R8, [R2.64]", "MOV R12, R7"], 2),
        # The address of the second load is what the first one loads; narrower loads do not count.
        (["LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R6.64]", "LDG.E R12, [R2.64]"], 1),
        # What no store follows is another way through a kernel that stores.
        (["LDG.E.128 R4, [R2.64]", "STG.E.128 [R2.64], R4", "LDG.E.128 R8, [R2.64]", "LDG.E.128 R12, [R2.64]"], 1),
        # Overwritten by another load.
        (["LDG.E.128 R4, [R2.64]", "LDG.E.128 R4, [R2.64+0x10]"], 1),
        (["FADD R4, R4, R9", "EXIT"], 0),
    ],
)
def test_loads_under_way(instructions: list[str], most: int) -> None:
    assert loads_under_way(code(*instructions)) == {"kernel": most}


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(static.StaticError, match="nvcc was not found"):
        static.measure()
