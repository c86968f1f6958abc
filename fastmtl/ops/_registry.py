"""The dispatcher as backend registry: one schema per op, a reference for every device, kernels by name.

Each op lives in the namespace ``fastmtl``, whose kernel of last resort is the pure-torch reference. That kernel also
loads the compiled backends: the first call on a device lands there, registers the better kernels and dispatches again.
The same schema in ``fastmtl_cpp`` and ``fastmtl_cuda`` reaches one backend by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from fastmtl.ops import _loader

__all__ = ["OPS", "backend_report", "declare", "implementation"]

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARIES = {ns: torch.library.Library(ns, "DEF") for ns in ("fastmtl", "fastmtl_cpp", "fastmtl_cuda")}


# The reference of each op.
OPS: dict[str, Callable[..., Any]] = {}


def declare(
    name: str,
    schema: str,
    *,
    check: Callable[P, object],
    reference: Callable[P, R],
    fake: Callable[P, R],
    check_contents: Callable[P, object] | None = None,
) -> Callable[P, R]:
    """Declare an op and return it as a function; where a kernel refuses the arguments, the checks raise their error.

    Args:
        name: Name of the op, of its C++ kernel and of its Triton module.
        schema: Arguments and result in the dispatcher's language, annotated where an argument is mutated.
        check: Refuses arguments that do not fit together; runs while compiling too, so it reads no entry.
        reference: Pure-torch implementation for every device, of arguments that have passed the checks.
        fake: Returns empty tensors with the shape, strides and dtype of the result; runs while compiling.
        check_contents: Refuses what only the numbers or their place in memory show.
    """
    checks = [check] if check_contents is None else [check, check_contents]
    reference = _checked(checks, reference)
    fake = _checked([check], fake)
    for namespace, library in _LIBRARIES.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    overload = getattr(torch.ops.fastmtl, name).default

    @functools.wraps(reference)
    def last_resort(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = _loader.first_tensor(args)
        if _loader.settle(name, "cpu" if tensor is None else tensor.device.type):
            return overload(*args, **kwargs)
        return reference(*args, **kwargs)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return overload(*args, **kwargs)
        except RuntimeError:
            # Kernels refuse with a terse message.
            for refuse in checks:
                refuse(*args, **kwargs)
            raise

    _LIBRARIES["fastmtl"].impl(name, last_resort, "CompositeExplicitAutograd")
    OPS[name] = torch.no_grad()(reference)
    return call


def _checked(checks: Sequence[Callable[P, object]], function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for check in checks:
            check(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """Return one backend's implementation of an op, with the op's low-level signature.

    Args:
        op: Name of the op, such as ``"gram"``.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        UsageError: No such op or backend.
        BackendError: The backend, or its kernel for this op, is not available; the message says why.
    """
    from fastmtl.support.names import resolve_name

    name = resolve_name(op, {name: name for name in OPS}, "op")
    if resolve_name(backend, {known: known for known in _loader.BACKENDS}, "backend") == "reference":
        return OPS[name]
    return _loader.kernel(name, backend)


def backend_report() -> list[dict[str, str]]:
    """Return, for each op and device type, the backend it would use and why the better ones are absent.

    Each entry has the keys ``op``, ``device``, ``backend`` and ``absent`` (empty if nothing better is absent).
    """
    return [{"op": op, "device": device, **_loader.prospect(op, device)} for op in OPS for device in _loader.PREFERENCE]
