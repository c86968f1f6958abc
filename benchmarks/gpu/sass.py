"""Machine code as cuobjdump prints it: how many instructions of some kinds a kernel has, and loads under way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

__all__ = ["count_instructions", "loads_under_way"]

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


# What a load of 128 bits writes to, the first of four registers, and where it reads.
_LOAD_128 = re.compile(r"\sLDG\.E\.(?:\w+\.)*128(?:\.\w+)*\s+R(\d+),(.*)")
_REGISTER = re.compile(r"\bR(\d+)\b")


def _kernels(sass: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each kernel's mangled name and its instructions, in the order in which they lie."""
    for part in sass.split("Function :")[1:]:
        name, code = part.split("\n", 1)
        yield name.strip(), [hit[1] for hit in map(_INSTRUCTION.match, code.splitlines()) if hit]


def count_instructions(sass: str) -> dict[str, Counter[str]]:
    """Return, by mangled name, how often each kind of instruction is in a kernel."""
    return {
        name: Counter(kind for text in code for kind, pattern in _PATTERNS.items() if pattern.search(text))
        for name, code in _kernels(sass)
    }


def loads_under_way(sass: str) -> dict[str, int]:
    """Return, by mangled name, how many loads of 128 bits a lane has under way at most.

    A load is under way until an instruction names one of its registers, which waits for it. In a kernel that stores 128
    bits at a time, loads count if such a store comes after them: others are those of rare ways through it. The code is
    read from its beginning to its end, branches are not followed: loads that a loop leaves for its next turn are seen
    once.
    """
    return {name: _most_under_way(code) for name, code in _kernels(sass)}


def _most_under_way(code: list[str]) -> int:
    pending: list[range] = []
    most, since_store, before_store = 0, 0, None
    for text in code:
        load = _LOAD_128.search(text)
        named = {int(register) for register in _REGISTER.findall(load[2] if load else text)}
        pending = [registers for registers in pending if named.isdisjoint(registers)]
        if load:
            target = range(int(load[1]), int(load[1]) + 4)
            pending = [registers for registers in pending if registers.start != target.start] + [target]
            since_store = max(since_store, len(pending))
            most = max(most, len(pending))
        elif _PATTERNS["stores_128"].search(text):
            before_store = max(before_store or 0, since_store)
            since_store = len(pending)
    return most if before_store is None else before_store
