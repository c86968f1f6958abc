"""The `fastmtl` command. Importing it brings neither torch nor any other heavy package."""

from __future__ import annotations

from fastmtl.cli.entry import main

__all__ = ["main"]
