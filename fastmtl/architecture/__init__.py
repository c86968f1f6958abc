"""Multi-task architectures, by LibMTL's names."""

from __future__ import annotations

from fastmtl.architecture.base import AbsArchitecture
from fastmtl.architecture.HPS import HPS
from fastmtl.architecture.MTAN import MTAN

__all__ = ["ARCHITECTURES", "HPS", "MTAN", "AbsArchitecture"]

ARCHITECTURES: dict[str, type[AbsArchitecture]] = {"HPS": HPS, "MTAN": MTAN}
