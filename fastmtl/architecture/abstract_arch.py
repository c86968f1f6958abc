"""The base of architectures, where classes written for LibMTL import it from."""

from __future__ import annotations

from fastmtl.architecture.base import AbsArchitecture

__all__ = ["AbsArchitecture"]
