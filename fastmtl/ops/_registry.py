"""The dispatcher as backend registry: one schema per op, a reference for every device, kernels by name.

Each op lives in the namespace ``fastmtl``, whose kernel of last resort is the pure-torch reference. That kernel also
loads the compiled backends: the first call on a device lands there, registers the better kernels and dispatches again.
The same schema in ``fastmtl_cpp`` and ``fastmtl_cuda`` reaches one backend by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastmtl.ops import _loader

__all__ = ["OPS", "Op", "backend_report", "declare", "implementation"]

_LIBRARIES = {ns: torch.library.Library(ns, "DEF") for ns in ("fastmtl", "fastmtl_cpp", "fastmtl_cuda")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One op: its schema without the name, its reference and its overload in the namespace ``fastmtl``."""

    name: str
    schema: str
    reference: Callable[..., Any]
    overload: Callable[..., Any]


OPS: dict[str, Op] = {}


def declare(name: str, schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Declare an op and return it.

    Args:
        name: Name of the op, of its C++ kernel and of its Triton module.
        schema: Arguments and result in the dispatcher's language, annotated where an argument is mutated.
        reference: Pure-torch implementation for every device.
        fake: Returns empty tensors with the shape, strides and dtype of the result; runs while compiling.
    """
    for namespace, library in _LIBRARIES.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    overload = getattr(torch.ops.fastmtl, name).default

    @functools.wraps(reference)
    def last_resort(*args: Any, **kwargs: Any) -> Any:
        if _loader.settle(name, _device_type(args)):
            return overload(*args, **kwargs)
        return reference(*args, **kwargs)

    _LIBRARIES["fastmtl"].impl(name, last_resort, "CompositeExplicitAutograd")
    OPS[name] = Op(name=name, schema=schema, reference=torch.no_grad()(reference), overload=overload)
    return overload


def _device_type(args: tuple[Any, ...]) -> str:
    for arg in args:
        for item in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(item, torch.Tensor):
                return item.device.type
    return "cpu"


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """Return one backend's implementation of an op, with the op's low-level signature.

    Args:
        op: Name of the op, such as ``"gram"``.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        UsageError: No such op or backend.
        BackendError: The backend, or its kernel for this op, cannot be had; the message says why.
    """
    from fastmtl.support.names import resolve_name

    declared = resolve_name(op, OPS, "op")
    if resolve_name(backend, {name: name for name in _loader.BACKENDS}, "backend") == "reference":
        return declared.reference
    return _loader.kernel(declared.name, backend)


def backend_report() -> list[dict[str, str]]:
    """Return, for each op and device type, the backend it would use and why the better ones are absent.

    Each entry has the keys ``op``, ``device``, ``backend`` and ``absent`` (empty if nothing better is absent).
    """
    return [{"op": op, "device": device, **_loader.prospect(op, device)} for op in OPS for device in _loader.PREFERENCE]
