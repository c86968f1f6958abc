"""Benchmarks of the ops: correct first, then timed against baselines and the machine's memory bandwidth in the same run."""

from __future__ import annotations

from fastmtl.benchmarks.runner import run_kernels

__all__ = ["run_kernels"]
