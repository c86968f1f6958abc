"""Facts about the machine and the software that belong to every result, and its memory bandwidth."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastmtl

__all__ = ["Probes", "cold_seconds", "facts", "plain_pass", "probes", "wait_for"]

# At least five times the last-level cache; that of a GPU holds up to 50 MB.
_PROBE_ELEMENTS = {"cpu": 64 << 20, "cuda": 256 << 20}
# Cycles for which a GPU is held before a call: half a millisecond, then more where the host takes longer to ask.
_HOLDS = (1 << 20, 1 << 23, 1 << 26)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done its queued work."""
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
    """Ways to measure the bytes per second of reading and of copying (read plus written), a pass a call.

    ``multiply_adds`` measures float32 multiply-adds per second, where that can be done.
    """

    read: Sequence[Callable[[], float]]
    copy: Sequence[Callable[[], float]]
    multiply_adds: Callable[[], float] | None = None


def probes(device: torch.device) -> Probes:
    """Return torch's own reads and copies and, on the CPU, the loops in ``fastmtl._host``, with torch's threads."""
    source = torch.ones(_PROBE_ELEMENTS.get(device.type, 64 << 20), device=device)
    target = torch.empty_like(source)

    def rate(call: Callable[[], object], passes: int) -> float:
        return passes * source.nbytes / (_device_seconds if device.type == "cuda" else _seconds)(call, device)

    read: list[Callable[[], float]] = [lambda: rate(source.sum, 1)]
    copy: list[Callable[[], float]] = [lambda: rate(lambda: target.copy_(source), 2)]
    if device.type == "cuda":
        read.append(lambda: rate(source.amax, 1))
        copy.append(lambda: rate(lambda: torch.neg(source, out=target), 2))
    if device.type == "cpu":
        try:
            from fastmtl import _host
        except ImportError:
            pass
        else:
            threads = torch.get_num_threads()
            memory = _host.Memory(threads=threads)
            read += [partial(memory.read, way) for way in range(memory.read_ways)]
            copy += [partial(memory.copy, way) for way in range(memory.copy_ways)]
            return Probes(read, copy, partial(_host.multiply_add_rate, threads))
    return Probes(read, copy)


def plain_pass(reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Callable[[], float] | None:
    """Return a function that times reading tensors and copying the first ones to others; None if there is none."""
    if not reads or reads[0].device.type != "cpu":
        return None
    try:
        from fastmtl import _host
    except ImportError:
        return None
    sources, targets = ([(t.data_ptr(), t.nbytes) for t in some] for some in (reads, writes))
    return partial(_host.plain_pass, sources, targets, torch.get_num_threads())


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start


def _device_seconds(
    call: Callable[[], object], device: torch.device, prepare: Callable[[], object] = lambda: None
) -> float:
    """Return the time between two events of the stream around a call, after ``prepare``: the device's work alone.

    The device is held before the first event until the host has asked for the whole call, or what it waits for the host
    would count. A call that the device overtook is made again with a longer hold; a call that itself waits for the
    device is overtaken every time, and its waits count.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        for cycles in _HOLDS:
            prepare()
            torch.cuda._sleep(cycles)
            begin.record()
            call()
            end.record()
            if not begin.query():
                break
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


@functools.cache
def _swept(device: torch.device) -> torch.Tensor:
    return torch.zeros(_PROBE_ELEMENTS["cuda"], device=device)


def cold_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the time a GPU takes for a call that finds nothing of its memory in the cache.

    The cache is swept by reading: what a write leaves there would have to go back to memory during the call.
    """
    return _device_seconds(call, device, _swept(device).sum)
