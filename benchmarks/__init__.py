"""Benchmarks of the ops: correct first, then timed beside baselines and the memory bandwidth of the same run."""

from __future__ import annotations

from fastmtl.benchmarks.runner import run_kernels

__all__ = ["run_kernels"]
