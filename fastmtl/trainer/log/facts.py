"""What a run was made with: versions, commit, machine; and the most memory it has had."""

from __future__ import annotations

import functools
import importlib
import platform
import subprocess
import sys
from pathlib import Path

import torch

__all__ = ["made_with", "peak_memory"]


def made_with(device: torch.device) -> dict[str, str | int | None]:
    """Return versions, the commit of fastmtl's checkout (None if it is no checkout), machine and threads."""
    return {
        "fastmtl": importlib.import_module("fastmtl").__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes so far: of tensors on a CUDA device, else of the whole process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@functools.cache
def _commit() -> str | None:
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
