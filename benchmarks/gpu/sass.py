"""Machine code as cuobjdump prints it: what kinds of instructions a kernel has, and which of them are in its loops."""

from __future__ import annotations

import re
from collections import Counter

__all__ = ["count_instructions"]

_KINDS = {
    "loads": r"LDG?\.E",
    "loads_128": r"LDG\.E\.(?:\w+\.)*128",
    "stores_128": r"STG\.E\.(?:\w+\.)*128",
    "local": r"(?:LDL|STL)",
    "float64": r"(?:DADD|DMUL|DFMA)",
    "matrix": r"(?:HMMA|DMMA|HGMMA)",
}
_PATTERNS = {kind: re.compile(rf"\s{pattern}\b") for kind, pattern in _KINDS.items()}
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/(\s.*?);")
_BACK = re.compile(r"\sBRA\S*\s.*?0x([0-9a-f]+)")

Instruction = tuple[int, set[str]]


def count_instructions(sass: str) -> dict[str, Counter[str]]:
    """Return, by mangled name, how often each kind of instruction is in a kernel.

    ``local_hot`` are the accesses to local memory in the loops that multiply matrices from vectors of 128 bits alone;
    the loops of strips' ends also load single elements.
    """
    found: dict[str, Counter[str]] = {}
    for part in sass.split("Function :")[1:]:
        name, code = part.split("\n", 1)
        lines = [(int(hit[1], 16), hit[2]) for hit in map(_INSTRUCTION.match, code.splitlines()) if hit]
        instructions = [(at, {kind for kind, each in _PATTERNS.items() if each.search(text)}) for at, text in lines]
        counts = Counter(kind for _, kinds in instructions for kind in kinds)
        jumps = [(int(hit[1], 16), at) for at, text in lines if (hit := _BACK.search(text))]
        loops = [_between(instructions, begin, end) for begin, end in jumps if begin <= end]
        counts["local_hot"] = sum(loop["local"] for loop in _innermost(loops) if loop["loads"] == loop["loads_128"])
        found[name.strip()] = counts
    return found


def _between(instructions: list[Instruction], begin: int, end: int) -> Counter[str]:
    inside = Counter(kind for at, kinds in instructions if begin <= at <= end for kind in kinds)
    inside["begin"], inside["end"] = begin, end
    return inside


def _innermost(loops: list[Counter[str]]) -> list[Counter[str]]:
    """Return the loops that multiply and have no other such loop inside."""
    multiply = [loop for loop in loops if loop["matrix"]]

    def has_inner(loop: Counter[str]) -> bool:
        return any(
            each is not loop and loop["begin"] <= each["begin"] and each["end"] <= loop["end"] for each in multiply
        )

    return [loop for loop in multiply if not has_inner(loop)]
