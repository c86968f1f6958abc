"""Other libraries, run beside us."""

from __future__ import annotations

from fastmtl.benchmarks.peers.libmtl import edge_matrices, libmtl_can, libmtl_solvers, libmtl_step
from fastmtl.benchmarks.peers.torchjd import torchjd_aggregator, torchjd_can, torchjd_solvers, torchjd_step

__all__ = [
    "edge_matrices",
    "libmtl_can",
    "libmtl_solvers",
    "libmtl_step",
    "torchjd_aggregator",
    "torchjd_can",
    "torchjd_solvers",
    "torchjd_step",
]
