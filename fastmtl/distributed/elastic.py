"""Restarts of a run by ``torchrun``."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["mark", "was_restarted"]

_MARK = "launch"


def _launch() -> str | None:
    """Return an identifier of this launch, equal in all its restarts; None without ``torchrun``."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without a rendezvous id the agent's process id identifies the launch.
    return f"agent {os.getppid()}" if run_id == "none" else run_id


def mark(run: Path) -> None:
    """Write the identifier of this launch to a run directory."""
    launch = _launch()
    if launch is not None:
        (run / _MARK).write_text(launch, encoding="utf-8")


def was_restarted(run: Path) -> bool:
    """Return whether this process was restarted, and the same launch made the run directory before."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (run / _MARK).exists()
    return restarted and (run / _MARK).read_text(encoding="utf-8") == _launch()
