"""The Gram matrix of many losses' gradients, usually one per sample, without their Jacobian; by TorchJD's names."""

from __future__ import annotations

from fastmtl.autogram.engine import Engine

__all__ = ["Engine"]
