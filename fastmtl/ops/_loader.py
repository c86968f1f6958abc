"""Loads the compiled backends on first use and decides which one serves a device.

Nothing here runs at import. Why a backend is not available is found out once and remembered.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fastmtl.errors import BackendError
from fastmtl.support import env

__all__ = ["BACKENDS", "PREFERENCE", "first_tensor", "kernel", "prospect", "settle"]

BACKENDS = ("reference", "cpp", "triton", "cuda")
PREFERENCE = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}

_PACKAGE = Path(__file__).resolve().parents[1]
_SHARED_OBJECT = {"cpp": "_C.abi3.so", "cuda": "_CUDA.abi3.so"}
_KEY = {"cpp": "CPU", "cuda": "CUDA", "triton": "CUDA"}

_log = logging.getLogger("fastmtl")
_lock = threading.RLock()
_settled: set[tuple[str, str]] = set()
_said: set[str] = set()
_triton_library: list[torch.library.Library] = []


@functools.cache
def _library(backend: str) -> ctypes.CDLL | str:
    """Return the loaded shared object of a backend, or why there is none."""
    path = _PACKAGE / _SHARED_OBJECT[backend]
    if not path.is_file():
        return f"{path.name} was not built{_build_reason(path.name.split('.')[0])}"
    env.read("FASTMTL_ISA")  # The kernels read it too, but cannot complain.
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} was built for another torch or system and cannot be loaded: {error}"


def _build_reason(extension: str) -> str:
    try:
        record = json.loads((_PACKAGE / "_build.json").read_text())
        return f": {record['missing'][f'fastmtl.{extension}']}"
    except (OSError, ValueError, KeyError):
        return ""


def first_tensor(args: Iterable[object]) -> torch.Tensor | None:
    """Return the first tensor among arguments and in the lists among them."""
    items = itertools.chain.from_iterable(arg if isinstance(arg, (list, tuple)) else (arg,) for arg in args)
    return next((item for item in items if isinstance(item, torch.Tensor)), None)


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a Triton kernel that launches on the device its first tensor is on: Triton takes the current one."""

    @functools.wraps(kernel)
    def launch(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first_tensor(args)):
            return kernel(*args, **kwargs)

    return launch


@functools.cache
def _find(op: str, backend: str) -> Callable[..., Any] | str:
    """Return one backend's kernel of an op, or the reason why there is none."""
    if backend == "triton":
        # An op in place and an op on rows live with the op whose name they extend.
        module = f"fastmtl.kernels.{op.removesuffix('_').removesuffix('_rows')}"
        try:
            return _on_its_device(getattr(importlib.import_module(module), op))
        except ModuleNotFoundError as error:
            if error.name == module:
                return f"{op} has no Triton kernel"
            return f"Triton cannot be imported ({error}; pip install triton)"
    library = _library(backend)
    if isinstance(library, str):
        return library
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmtl_{backend}::{op}", _KEY[backend]):
        return f"{_SHARED_OBJECT[backend]} has no kernel for {op}"
    return getattr(getattr(torch.ops, f"fastmtl_{backend}"), op).default


@functools.cache
def _register(backend: str) -> None:
    """Make a loaded shared object's kernels the ones of the namespace ``fastmtl``."""
    library = _library(backend)
    assert isinstance(library, ctypes.CDLL)
    library.fastmtl_register_default()


def _choose(op: str, device: str) -> tuple[str, list[str]]:
    """Return the backend for an op on a device and why better ones are absent; BackendError for a forced one."""
    choice = env.read("FASTMTL_BACKEND")
    if choice == "reference":
        return choice, []
    if choice != "auto" and choice not in PREFERENCE.get(device, ()):
        raise BackendError(
            f"FASTMTL_BACKEND={choice} cannot serve {op} on {device}: it has no kernels for this device."
        )
    absent: list[str] = []
    for backend in PREFERENCE.get(device, ()) if choice == "auto" else (choice,):
        result = _find(op, backend)
        if not isinstance(result, str):
            return backend, absent
        if choice == backend:
            raise BackendError(f"FASTMTL_BACKEND={choice} cannot serve {op} on {device}: {result}.")
        absent.append(f"{backend}: {result}")
    return "reference", absent or [f"there are no kernels for {device}"]


def settle(op: str, device: str) -> bool:
    """Register the chosen backend's kernel of an op for a device; return whether this call registered one."""
    if (op, device) in _settled:
        return False
    with _lock:
        backend, absent = _choose(op, device)
        _settled.add((op, device))
        if backend == "triton":
            library = torch.library.Library("fastmtl", "IMPL")
            library.impl(op, _find(op, backend), _KEY[backend])
            _triton_library.append(library)
        elif backend != "reference":
            _register(backend)
        reason = "; ".join(absent)
        if backend == "reference" and absent and reason not in _said:
            _said.add(reason)
            _log.warning("Plain torch operators are used in place of compiled kernels on %s (%s).", device, reason)
    return backend != "reference"


def kernel(op: str, backend: str) -> Callable[..., Any]:
    """Return a compiled backend's kernel of an op, or raise a BackendError that says why there is none."""
    result = _find(op, backend)
    if isinstance(result, str):
        raise BackendError(f"The {backend} backend of {op} is not available: {result}.")
    return result


def prospect(op: str, device: str) -> dict[str, str]:
    """Return the backend an op would use on a device, and why better ones are absent."""
    try:
        backend, absent = _choose(op, device)
    except BackendError as error:
        backend, absent = "none", [str(error)]
    return {"backend": backend, "absent": "; ".join(absent)}
