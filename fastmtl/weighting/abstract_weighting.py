"""The base of strategies, where classes written for LibMTL import it from."""

from __future__ import annotations

from fastmtl.weighting.base import AbsWeighting

__all__ = ["AbsWeighting"]
