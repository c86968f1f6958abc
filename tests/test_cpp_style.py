"""The dialect of the C++ and CUDA sources, as CONTRIBUTING writes it; clang-format sees to const and spacing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Has CUDA's own names.
EMULATION = "cuda_emulation.h"
SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}
SOURCES = sorted(p for room in ("csrc", "kernels") for p in (ROOT / room).rglob("*") if p.suffix in SUFFIXES)

_NOT_K = r"constexpr [\w:<>, *]+? (?!k[A-Z])\w+(?:\[\d*\])?(?: =|\{)"
RULES = {
    # Outside functions, and static in classes.
    r"^(?:inline |static |template <.*> |  static )*" + _NOT_K: "constants are kName",
    r"^ *(?:enum class|class|struct)(?: alignas\(\w+\))? (?!alignas)[a-z]\w* *(?:\{|:|final|$)": "types are TypeName",
    r"^ *using (?!namespace|type\b)[a-z]\w*(?: __attribute__.*)? =": "types are TypeName",
    r"^ *typedef\b": "using, not typedef",
    r"\bstd::(?:size_t|u?int\d+_t|u?intptr_t)\b": "integers need no std",
    r"^ *#define (?!FASTMTL_)": "macros are FASTMTL_NAME",
    r"(?<![\w.:>])NULL\b": "nullptr, not NULL",
    r"^(?:[\w:<>&*, ]+ )?[a-z]+[A-Z]\w*\(.*\) (?:const )?\{": "functions are snake_case",
    r"^// .*\n(?:// .*\n)*(?=[a-zA-Z])": "/// documents a declaration",
}


def faults(text: str) -> list[str]:
    """Return each rule that a source breaks, with the line that does."""
    said = []
    for pattern, rule in RULES.items():
        said += [f"{rule}: {found[0].strip()}" for found in re.finditer(pattern, text, re.MULTILINE)]
    return said


def test_sources_keep_the_dialect() -> None:
    assert len(SOURCES) > 100
    named = {path.name: faults(path.read_text()) for path in SOURCES if path.name != EMULATION}
    assert {name: broken for name, broken in named.items() if broken} == {}


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("constexpr int warp_size = 32;", "constants are kName"),
        ("template <class T> constexpr int lanes_of = 16 / sizeof(T);", "constants are kName"),
        ("  static constexpr int vectors = 8;", "constants are kName"),
        ("constexpr double values[] = {1};", "constants are kName"),
        ("struct team {", "types are TypeName"),
        ("using buffer = std::vector<float>;", "types are TypeName"),
        ("typedef float Real;", "using, not typedef"),
        ("std::int64_t const n = 1;", "integers need no std"),
        ("#define TILE 8", "macros are FASTMTL_NAME"),
        ("int rowCount(int n) {", "functions are snake_case"),
        ("// The number of rows.\nint rows(int n) {", "/// documents a declaration"),
    ],
)
def test_a_break_of_a_rule_is_named(line: str, rule: str) -> None:
    assert [fault.split(":")[0] for fault in faults(f"#pragma once\n\n{line}\n")] == [rule]


def test_what_the_rules_allow() -> None:
    text = """\
// What the file is about.
#pragma once

/// Lanes of a warp.
constexpr int kWarpSize = 32;
constexpr int rows_of(int n) { return n; }
template <class T>
constexpr int kLanesOf = 16 / sizeof(T);
using Buffer = std::vector<float>;

/// A row.
struct Row {
  static constexpr int kVectors = 8;
  static constexpr int size() { return 1; }
  int count = 0;  // Elements.
};
"""
    assert faults(text) == []
