"""Every launch of a Triton kernel that differs in what is compiled for it, recorded without a GPU.

The launchers themselves run, on tensors of the CPU, with Triton told that the device is a GPU: a launch is recorded
with the dtypes, alignments and constants that Triton would compile it for, and is not made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
import triton
from fastmtl.kernels.combine import combine, combine_
from fastmtl.kernels.graddrop import graddrop, graddrop_rows
from fastmtl.kernels.gram import gram
from fastmtl.kernels.min_norm import min_norm
from fastmtl.kernels.pcgrad import pcgrad
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

__all__ = ["CAPABILITIES", "Launch", "record", "recording"]

CAPABILITIES = (80, 90)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Kernels pad the tasks to a power of two.
_TASKS, _UNALIGNED_TASKS = (1, 2, 3, 8, 17), (3,)


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """What is compiled for a launch.

    Attributes:
        kernel: The kernel.
        signature: Triton's type of each argument.
        constants: The value of each constant, by its path among the arguments.
        attributes: What is known of the others, such as their alignment, by their paths.
        warps: Warps of a program.
        capability: Of the device.
    """

    kernel: JITFunction[Any]
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    warps: int
    capability: int

    @property
    def digest(self) -> str:
        """Return a digest of all that decides on the machine code but Triton itself."""
        said = [self.signature, sorted(map(str, self.constants.items())), sorted(map(str, self.attributes.items()))]
        code = "".join(_sources(self.kernel, set()))
        whole = json.dumps([code, str(said), self.warps, self.capability])
        return hashlib.sha256(whole.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """Return the constants, then the types of tensors and what of them is not aligned, for a reader."""
        names = self.kernel.arg_names
        words = [f"{names[path[0]]}={value}" for path, value in self.constants.items() if len(path) == 1]
        words += [f"{names[path[0]]}[{path[1]}]={value}" for path, value in self.constants.items() if len(path) > 1]
        types = [kind for kind in self.signature.values() if isinstance(kind, tuple)]
        flat = [*self.signature.values(), *(inner for kind in types for inner in kind)]
        words += sorted({str(kind) for kind in flat if isinstance(kind, str) and kind.startswith("*")})
        uneven = [names[path[0]] for path, known in self.attributes.items() if not known and self._is_memory(path)]
        return " ".join([*words, *(f"{name}%16" for name in dict.fromkeys(uneven))])

    def _is_memory(self, path: tuple[int, ...]) -> bool:
        """Return whether vectors depend on an argument: it is a tensor, or the length of one."""
        name = self.kernel.arg_names[path[0]]
        kind = self.signature[name]
        kind = kind[path[1]] if len(path) > 1 else kind
        return kind.startswith("*") or name in ("numel", "features")

    def compile(self) -> CompiledKernel:
        """Return what Triton makes of it."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        target = GPUTarget("cuda", self.capability, 32)
        return triton.compile(source, target=target, options={"num_warps": self.warps})


def _sources(kernel: JITFunction[Any], seen: set[str]) -> Iterator[str]:
    """Yield the text of a kernel, of the functions it calls and of the constants it names."""
    yield kernel.src
    for name in dict.fromkeys(re.findall(r"\w+", kernel.src)):
        value = kernel.__globals__.get(name)
        if name in seen or value is None:
            continue
        seen.add(name)
        if isinstance(value, JITFunction):
            yield from _sources(value, seen)
        elif isinstance(value, triton.language.constexpr):
            yield f"{name} = {value.value}"


class _Driver:
    """What Triton asks a driver before it compiles; a device's number is its capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def recording(capability: int, launches: dict[str, Launch]) -> Iterator[None]:
    """Add launches to ``launches``, by digest, instead of making them."""

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launch = Launch(
            fn.jit_function,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            compile["num_warps"],
            capability,
        )
        launches.setdefault(launch.digest, launch)
        return True

    runtime, driver = triton.knobs.runtime, triton.runtime.driver
    before = driver._active, runtime.jit_cache_hook
    driver.set_active(_Driver(capability))
    runtime.jit_cache_hook = note
    try:
        yield
    finally:
        driver._active, runtime.jit_cache_hook = before


def _tensors(count: int, dtype: torch.dtype, shape: tuple[int, ...], aligned: bool) -> list[Tensor]:
    """Return tensors that begin at multiples of 16 bytes, or one element after them."""
    size = torch.Size(shape).numel()
    return [torch.empty(size + 16, dtype=dtype)[0 if aligned else 1 :][:size].view(shape) for _ in range(count)]


def _launch_rows(dtype: torch.dtype, tasks: int, aligned: bool) -> None:
    """Launch what reads rows: one parameter, whose length is a multiple of 16 where memory is."""
    shape = (2048 if aligned else 2047,)
    rows: list[Tensor | None] = [*_tensors(tasks, dtype, shape, aligned)]
    out = _tensors(1, dtype, shape, aligned)
    weights = torch.ones(tasks, dtype=torch.float64)
    random = torch.zeros(2, dtype=torch.int64)
    gram(rows, tasks)
    combine(rows, tasks, weights)
    combine_(out, rows, tasks, weights, None, accumulate=True)
    graddrop_rows(rows, tasks, torch.ones(tasks, dtype=torch.float64), random, [])


def _launch_drop(dtype: torch.dtype, tasks: int, aligned: bool) -> None:
    """Launch graddrop of representations, one for all tasks and one for each."""
    shape = (4, 512 if aligned else 511)
    reps, grads = (_tensors(tasks, dtype, shape, aligned) for _ in range(2))
    for given in (reps[:1], reps):
        graddrop(given, grads, 0.5, torch.zeros(2, dtype=torch.int64))


def _launch_others() -> None:
    """Launch what differs in more than dtype, number of tasks and alignment."""
    random = torch.zeros(2, dtype=torch.int64)
    noise = torch.zeros(2048, dtype=torch.float64)
    rows: list[Tensor | None] = [*_tensors(3, torch.float32, (2048,), True)]
    # Rows that are not there, all that can be.
    for missing in ([0], [1], [2], [0, 1], [0, 2], [1, 2]):
        some = [None if t in missing else row for t, row in enumerate(rows)]
        gram(some, 3)
        combine(some, 3, torch.ones(3))
        graddrop_rows(some, 3, torch.ones(3), random, [])
    graddrop_rows(rows, 3, torch.ones(3), random, [noise])
    for given in (1, 3):
        features = _tensors(3, torch.float32, (4, 2048), True)
        graddrop(features[:given], features, 0.5, random, noise)
    # A batch of one row, and batches of other sizes.
    batches = [torch.empty(size, 512) for size in (1, 0, 5)]
    graddrop(batches, batches, 0.5, random)
    # Results of another dtype, float32 weights, and a length of one.
    for row, out in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float64)):
        combine_(_tensors(1, out, (2048,), True), [*_tensors(3, row, (2048,), True)], 3, torch.ones(3))
    single: list[Tensor | None] = [torch.empty(1) for _ in range(3)]
    gram(single, 3)
    combine(single, 3, torch.ones(3))
    graddrop_rows(single, 3, torch.ones(3), random, [])
    gram([*_tensors(12, torch.float32, (2048,), True)], 12)
    _launch_drop(torch.float32, 9, True)
    combine([*_tensors(128, torch.float32, (2048,), True)], 128, torch.ones(128))


def _launch_solvers(tasks: int) -> None:
    gram_matrix = torch.eye(tasks, dtype=torch.float64)
    min_norm(gram_matrix)
    pcgrad(gram_matrix, torch.zeros(tasks, tasks, dtype=torch.int64))
    for kind in (torch.float32, torch.float64):
        pcgrad(gram_matrix, torch.zeros(tasks, tasks, dtype=kind))


def record() -> list[Launch]:
    """Return all launches, for each capability."""
    launches: dict[str, Launch] = {}
    with recording(CAPABILITIES[0], launches):
        for dtype, aligned in itertools.product(_DTYPES, (True, False)):
            for tasks in _TASKS if aligned else _UNALIGNED_TASKS:
                _launch_rows(dtype, tasks, aligned)
                _launch_drop(dtype, tasks, aligned)
        for tasks in (1, 2, 3, 8, 9, 17, 32):
            _launch_solvers(tasks)
        _launch_others()
    return [dataclasses.replace(one, capability=each) for each in CAPABILITIES for one in launches.values()]
