"""What this installation can do here: versions, devices, backends, memory bandwidth, torch.compile.

``report`` gathers plain data and ``render`` turns it into text. Neither fails because something is missing: a missing
part is reported as missing, with its reason.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fastmtl
from fastmtl.support import env

__all__ = ["render", "report"]

_PACKAGES = ("torch", "torchvision", "triton", "numpy")
_FALLBACK_BYTES = 256 << 20

# What is known of something, by name, as JSON can hold it.
Facts = dict[str, Any]
Rows = Iterable[tuple[str, str]]


def report(*, seconds: float = 0.25) -> Facts:
    """Return everything there is to know, by section, as data that JSON can hold.

    A section that could not be gathered is ``{"error": reason}``. Each of the two bandwidth measurements takes
    ``seconds``; 0 makes a few passes only.
    """
    sections: dict[str, Callable[[], object]] = {
        "versions": _versions,
        "build": _build,
        "devices": _devices,
        "ops": lambda: importlib.import_module("fastmtl.ops").backend_report(),
        "memory": lambda: _memory(seconds),
        "compile": _compile,
        "environment": lambda: {name: os.environ[name] for name in env.VARIABLES if os.environ.get(name)},
    }
    return {name: _gather(section) for name, section in sections.items()}


def _gather(section: Callable[[], object]) -> object:
    # A broken driver or a half-installed package raises anything at all, and the doctor is run because of it.
    try:
        return section()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {_first_line(error)}"}


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    # The loaded torch knows its build (+cpu, +cu130) even where its metadata does not.
    first = {"fastmtl": fastmtl.__version__, "python": platform.python_version()}
    return {**first, **{name: _version(name) for name in _PACKAGES}, "torch": torch.__version__}


def _host() -> ModuleType | str:
    """Return the module ``fastmtl._host``, or why it cannot be had."""
    try:
        return importlib.import_module("fastmtl._host")
    except ImportError as error:
        return _first_line(error)


def _build() -> Facts:
    path = Path(fastmtl.__file__).with_name("_build.json")
    record = json.loads(path.read_text()) if path.is_file() else None
    host = _host()
    if isinstance(host, str):
        return {"record": record}
    return {"record": record, "compiler": host.compiler, "flags": host.build_flags()}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _devices() -> list[Facts]:
    host = _host()
    isa = None if isinstance(host, str) else host.isa()
    threads, cores = torch.get_num_threads(), os.cpu_count()
    devices: list[Facts] = [{"device": "cpu", "name": _cpu_name(), "threads": threads, "cores": cores, "isa": isa}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = properties.total_memory
        devices.append({"device": f"cuda:{index}", "name": properties.name, "capability": capability, "bytes": memory})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU, without float64: T x T matrices are solved on the CPU"})
    return devices


def _memory(seconds: float) -> Facts:
    host = _host()
    threads = torch.get_num_threads()
    if isinstance(host, str):
        data = torch.ones(_FALLBACK_BYTES // 4)
        out = torch.empty_like(data)
        return {
            "method": f"torch.sum and Tensor.copy_, as fastmtl._host is missing ({host})",
            "threads": threads,
            "buffer_bytes": _FALLBACK_BYTES,
            "read_bytes_per_second": _FALLBACK_BYTES / _fastest(data.sum, seconds),
            "copy_bytes_per_second": 2 * _FALLBACK_BYTES / _fastest(lambda: out.copy_(data), seconds),
        }
    cache = host.last_level_cache()
    size = 8 * cache or _FALLBACK_BYTES
    return {
        "method": "vector sum; memcpy or non-temporal copy",
        "threads": threads,
        "last_level_cache_bytes": cache,
        "buffer_bytes": size,
        "read_bytes_per_second": host.read_bandwidth(size, threads, seconds),
        "copy_bytes_per_second": host.copy_bandwidth(size, threads, seconds),
    }


def _fastest(work: Callable[[], object], seconds: float) -> float:
    """Return the shortest time of one call, over ``seconds`` and three calls at least, after a first one."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _compile() -> Facts:
    inductor = importlib.import_module("fastmtl.engine.inductor")
    compiler, reason = inductor.cpp_compiler()
    functorch = importlib.import_module("torch._functorch.config")
    return {
        "cpu": compiler is not None,
        "cpu_reason": reason,
        "cpp_compiler": compiler,
        "triton": _version("triton"),
        "donated_buffer": getattr(functorch, "donated_buffer", None),
        "trace_autograd_ops": inductor.traces_gradients(),
    }


def render(data: Facts) -> str:
    """Return the text `fastmtl doctor` prints for a report."""
    sections: dict[str, Callable[[Any], Rows]] = {
        "versions": lambda versions: [(name, version or "not installed") for name, version in versions.items()],
        "build": _render_build,
        "devices": _render_devices,
        "ops": lambda ops: _render_ops(ops, data["devices"]),
        "memory": _render_memory,
        "compile": _render_compile,
        "environment": lambda variables: variables.items(),
    }
    lines: list[str] = []
    for name, rows in sections.items():
        section = data[name]
        if not section:
            continue
        failed = isinstance(section, dict) and section.keys() == {"error"}
        table = [("error", section["error"])] if failed else list(rows(section))
        width = max(len(label) for label, _ in table)
        lines += [name, *(f"  {label:<{width}}  {value}" for label, value in table), ""]
    return "\n".join(lines)


def _render_build(build: Facts) -> Rows:
    record = build["record"]
    if record is None:
        return [("extensions", f"none: this copy was not installed ({sys.executable} -m pip install .)")]
    rows = [(name, "built") for name in record["built"]]
    rows += [(name, f"not built: {reason}") for name, reason in record["missing"].items()]
    rows += [(name, str(build[name])) for name in ("compiler", "flags") if name in build]
    return rows


def _render_devices(devices: Iterable[Facts]) -> Rows:
    for device in devices:
        facts = [device["name"]]
        if "cores" in device:
            isa = device["isa"] or "instructions unknown"
            facts += [f"{device['threads']} threads on {device['cores']} cores", isa]
        if "capability" in device:
            facts += [f"compute capability {device['capability']}", f"{device['bytes'] / 2**30:.0f} GiB"]
        yield device["device"], ", ".join(facts)


def _render_ops(ops: Iterable[Mapping[str, str]], devices: Any) -> Rows:
    # Devices are a list, or why they could not be gathered.
    no_gpu = isinstance(devices, list) and not any(device["device"].startswith("cuda") for device in devices)
    for row in ops:
        if no_gpu and row["device"] == "cuda":
            continue
        reason = f"  ({row['absent']})" if row["absent"] else ""
        yield f"{row['op']} on {row['device']}", f"{row['backend']}{reason}"
    if no_gpu:
        yield "all on cuda", "torch finds no CUDA GPU here; --json has what each op would use on one"


def _render_memory(memory: Facts) -> Rows:
    if memory.get("last_level_cache_bytes"):
        yield "last-level cache", f"{memory['last_level_cache_bytes'] / 2**20:.0f} MiB"
    yield "read", f"{memory['read_bytes_per_second'] / 1e9:.1f} GB/s"
    yield "copy", f"{memory['copy_bytes_per_second'] / 1e9:.1f} GB/s, read and written bytes together"
    yield "measured by", f"{memory['method']}, {memory['threads']} threads, {memory['buffer_bytes'] >> 20} MiB"


def _render_compile(facts: Facts) -> Rows:
    yield "on cpu", f"yes, with {facts['cpp_compiler']}" if facts["cpu"] else facts["cpu_reason"]
    yield "on cuda", f"Triton {facts['triton']}" if facts["triton"] else "no: Triton is not installed"
    donated = {True: "on by default", False: "off"}.get(facts["donated_buffer"], "not in this torch")
    yield "donated buffers", donated
    yield "gradients in the graph", "available" if facts["trace_autograd_ops"] else "not in this torch"
