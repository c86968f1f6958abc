"""Facts about the machine and the software that belong to every result, and its memory bandwidth."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastmtl

__all__ = ["bandwidth", "facts", "wait_for"]

_PROBE_ELEMENTS = 64 << 20


def wait_for(device: torch.device) -> None:
    """Return when the device has done what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def facts(device: torch.device) -> dict[str, str | int]:
    """Return what must be known to compare a result with another one."""
    return {
        "device": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastmtl": fastmtl.__version__,
        "commit": _commit(),
    }


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(3):
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def bandwidth(device: torch.device) -> dict[str, float]:
    """Return bytes per second of reading and of copying (read plus written), with as many threads as torch uses.

    The best of torch's own sum and copy and, on the CPU, of the probes in ``fastmtl._host``.
    """
    source = torch.ones(_PROBE_ELEMENTS, device=device)
    target = torch.empty_like(source)
    read = source.nbytes / _fastest(source.sum, device)
    copy = 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)
    if device.type == "cpu":
        try:
            from fastmtl import _host
        except ImportError:
            return {"read": read, "copy": copy}
        threads = torch.get_num_threads()
        read = max(read, _host.read_bandwidth(threads=threads, seconds=0.1))
        copy = max(copy, _host.copy_bandwidth(threads=threads, seconds=0.1))
    return {"read": read, "copy": copy}
