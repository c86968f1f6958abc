"""Rows for the tests of gram and combine: gradients as autograd may leave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from fastmtl.errors import BackendError
from fastmtl.ops import implementation

BACKENDS = ("reference", "cpp") + (("cuda",) if torch.cuda.is_available() else ())
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TASKS = (1, 2, 3, 5, 8, 16, 40, 128)
# One element, odd sizes, primes, one past a power of two, a chunk of the kernel and one more, and nothing at all.
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (63,), (129,), (3, 5, 7), (2048,), (4099,), (0,), (2, 0, 3), ())

Flat = list[Tensor | None]


def backend_kernel(op: str, backend: str) -> Callable[..., Any]:
    """Return one backend's kernel, or skip the test."""
    try:
        return implementation(op, backend)
    except BackendError as error:
        pytest.skip(str(error))


def row_kernel(op: str, backend: str) -> Callable[..., Any]:
    """Return one backend's kernel of an op on rows as a function of CPU tensors, or skip the test."""
    kernel = backend_kernel(op, backend)
    return on_device(kernel, "cuda") if backend == "cuda" else kernel


def on_device(kernel: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return a function of CPU tensors that runs on copies of their storages and copies back what it wrote."""

    def run(*args: Any) -> Any:
        storages: dict[int, tuple[Tensor, Tensor]] = {}
        there = [_moved(arg, device, storages) for arg in args]
        result = kernel(*there)
        for own, copy in storages.values():
            own.copy_(copy)
        return _moved(result, "cpu", {})

    return run


def _moved(value: Any, device: str, storages: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Return tensors, or lists of them, on a device with strides, offset and sharing of storages kept."""
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(each, device, storages) for each in value)
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    key = storage.data_ptr()
    if key not in storages:
        flat = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
        storages[key] = (flat, flat.to(device, copy=True))
    _, copy = storages[key]
    viewed = torch.empty(0, dtype=value.dtype, device=device).set_(copy.untyped_storage())
    return viewed.as_strided(value.shape, value.stride(), value.storage_offset())


def make_rows(
    num_rows: int, shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Flat:
    """Return T x K normal gradients, task-major."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(num_rows) for shape in shapes]


def relaid(tensor: Tensor, layout: str) -> Tensor:
    """Return the tensor's values in another memory layout."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() else tensor
    if layout == "strided":
        wide = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0]
    if layout == "expanded":
        return (tensor.flatten()[0] if tensor.numel() else tensor.new_ones(())).expand(tensor.shape)
    if layout == "offset":
        longer = torch.full((tensor.numel() + 3,), float("nan"), dtype=tensor.dtype)
        longer[3:] = tensor.flatten()
        return longer[3:].view(tensor.shape)
    raise ValueError(layout)


LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "expanded", "offset")


@st.composite
def any_rows(draw: st.DrawFn) -> tuple[Flat, int]:
    """Draw rows of any number, shape, dtype, layout and gaps."""
    num_rows = draw(st.integers(1, 6))
    shape = st.lists(st.integers(0, 5) | st.sampled_from([17, 33]), max_size=4).map(tuple)
    shapes = draw(st.lists(shape, max_size=4))
    seed = draw(st.integers(0, 2**16))
    flat: Flat = []
    for index, tensor in enumerate(make_rows(num_rows, tuple(shapes), torch.float32, seed)):
        assert tensor is not None
        if draw(st.booleans()) or draw(st.booleans()):
            tensor = tensor.to(draw(st.sampled_from(DTYPES)))
            flat.append(relaid(tensor, draw(st.sampled_from(LAYOUTS))))
        elif draw(st.booleans()):
            flat.append(flat[index - len(shapes)] if index >= len(shapes) else tensor)
        else:
            flat.append(None)
    assume(any(tensor is not None for tensor in flat))
    return flat, num_rows
