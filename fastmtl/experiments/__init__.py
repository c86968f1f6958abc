"""Whole experiments: grids of runs, their statistics and a report, beside published rows.

A grid (`grid.py`) is made of cells, each an ordinary run folder, which a pool of processes works off (`runner.py`).
`reading.py` reads run folders back, `statistics.py` computes what papers report of them, `report.py` writes it down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Problem", "Results", "compare"]

if TYPE_CHECKING:
    from fastmtl.experiments.own import Problem, Results, compare


def __getattr__(name: str) -> Any:
    # The process of a cell imports this package before it knows what it has to do.
    if name in __all__:
        from fastmtl.experiments import own

        return getattr(own, name)
    raise AttributeError(f"module 'fastmtl.experiments' has no attribute {name!r}")
