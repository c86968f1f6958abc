"""Weighting strategies, by LibMTL's names."""

from __future__ import annotations

from fastmtl.weighting.base import AbsWeighting, Weights
from fastmtl.weighting.EW import EW
from fastmtl.weighting.MGDA import MGDA

__all__ = ["EW", "MGDA", "WEIGHTINGS", "AbsWeighting", "Weights"]

WEIGHTINGS: dict[str, type[AbsWeighting]] = {"EW": EW, "MGDA": MGDA}
