"""What is left of a run when ``torchrun`` starts its processes again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["began_here", "mark"]

_MARK = "launch"


def _launch() -> str | None:
    """Return what names this launch in all its restarts, None without ``torchrun``."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without a name from a rendezvous, the agent that starts the processes is known by its number.
    return f"agent {os.getppid()}" if run_id == "none" else run_id


def mark(run: Path) -> None:
    """Leave the name of this launch in a run directory."""
    launch = _launch()
    if launch is not None:
        (run / _MARK).write_text(launch, encoding="utf-8")


def began_here(run: Path) -> bool:
    """Return whether this process was started again and an earlier start of the same launch made a run directory."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (run / _MARK).exists()
    return restarted and (run / _MARK).read_text(encoding="utf-8") == _launch()
