"""How to launch the Triton kernels: a fixed choice by number of rows, so that no step stops to search.

They are derived for Hopper from what a kernel keeps in registers - the float64 sums of all pairs of rows of a column in
one thread for `gram`, a few 16-byte loads per row in flight for `combine` - and hold on Ampere.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["COMBINE", "GRADDROP", "GRAM", "Launch", "pick"]


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block: Elements of each row taken at a time.
        steps: Blocks that one program takes one after another.
        warps: Warps of a program.
    """

    block: int
    steps: int
    warps: int


# By the number of rows, or the next larger one.
GRAM = {1: Launch(1024, 16, 4), 2: Launch(512, 32, 4), 4: Launch(256, 32, 4), 8: Launch(128, 64, 4)}
COMBINE = {4: Launch(2048, 1, 4), 128: Launch(1024, 1, 4)}
GRADDROP = {1: Launch(1024, 1, 4), 4: Launch(512, 1, 4), 8: Launch(256, 1, 4), 32: Launch(128, 1, 4)}


def pick(table: dict[int, Launch], num_rows: int) -> Launch:
    """Return how to launch a kernel on a number of rows."""
    return table[min(size for size in table if size >= num_rows)]
