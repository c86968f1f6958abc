"""Launch configurations of the Triton kernels: a fixed choice by number of rows, so that no step stops to search.

They are derived for Hopper from what a kernel keeps in registers - the float64 sums of all pairs of rows of a column in
one thread for `gram`, a few 16-byte loads per row in flight for `combine` - and hold on Ampere.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["COMBINE", "GRADDROP", "GRAM", "Config", "pick"]


class Config(NamedTuple):
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
GRAM = {1: Config(1024, 16, 4), 2: Config(512, 32, 4), 4: Config(256, 32, 4), 8: Config(128, 64, 4)}
COMBINE = {4: Config(2048, 1, 4), 8: Config(1024, 1, 4), 128: Config(512, 1, 4)}
GRADDROP = {4: Config(512, 1, 4), 8: Config(256, 1, 4), 32: Config(128, 1, 4)}


def pick(table: dict[int, Config], num_rows: int) -> Config:
    """Return the configuration for a number of rows."""
    return table[min(size for size in table if size >= num_rows)]
