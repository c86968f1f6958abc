"""Facts about the machine and the software that belong to every result, and its memory bandwidth."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import fastmtl

__all__ = ["Probes", "facts", "probes", "wait_for"]

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


@dataclass(frozen=True, slots=True)
class Probes:
    """Ways to measure the bytes per second of reading and of copying (read plus written), a pass a call."""

    read: Sequence[Callable[[], float]]
    copy: Sequence[Callable[[], float]]


def probes(device: torch.device) -> Probes:
    """Return torch's own sum and copy and, on the CPU, the loops in ``fastmtl._host``, with torch's threads."""
    source = torch.ones(_PROBE_ELEMENTS, device=device)
    target = torch.empty_like(source)
    read: list[Callable[[], float]] = [lambda: source.nbytes / _seconds(source.sum, device)]
    copy: list[Callable[[], float]] = [lambda: 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)]
    if device.type == "cpu":
        try:
            from fastmtl import _host
        except ImportError:
            pass
        else:
            memory = _host.Memory(threads=torch.get_num_threads())
            read += [partial(memory.read, way) for way in range(memory.read_ways)]
            copy += [partial(memory.copy, way) for way in range(memory.copy_ways)]
    return Probes(read, copy)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start
