"""Machine code as cuobjdump prints it: how many instructions of some kinds a kernel has."""

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
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/(\s.*?);")


def count_instructions(sass: str) -> dict[str, Counter[str]]:
    """Return, by mangled name, how often each kind of instruction is in a kernel."""
    kernels: dict[str, Counter[str]] = {}
    for part in sass.split("Function :")[1:]:
        name, code = part.split("\n", 1)
        instructions = [hit[1] for hit in map(_INSTRUCTION.match, code.splitlines()) if hit]
        kernels[name.strip()] = Counter(
            kind for text in instructions for kind, pattern in _PATTERNS.items() if pattern.search(text)
        )
    return kernels
