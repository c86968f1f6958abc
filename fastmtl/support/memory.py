"""The memory of a process: what the C library does with freed blocks, and the size of the system's pages."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys

import torch
from torch import Tensor, nn

__all__ = ["keep_freed_memory", "use_huge_pages", "zeros_in_huge_pages"]

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_BLOCK = 32 << 20  # the most glibc allows: half of a heap of 64 MiB
_NEVER = -1
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE = 2 << 20
# Below, the processor's own table of pages has room for all of it.
_LEAST = 32 << 20
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep freed memory of up to 32 MiB per block, so that the next training step on the CPU reuses it.

    A step frees the gradients of all tasks at its end. glibc would return that memory to the system, and each step
    would have a page fault per 4 KiB: 20,000 for three tasks and a ResNet-18. Returns whether this took effect: not
    with other C libraries, nor where environment variables configure malloc.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def use_huge_pages(tensor: Tensor) -> bool:
    """Let a large tensor on the CPU lie in pages of 2 MiB, in place of 4 KiB; return whether the system has taken note.

    Rows that are read here and there in a table of many pages cost a look-up of each one's page beside the row. The
    system copies what the tensor holds, 2 MiB at a time, as far as it has such pages (Linux 6.1); its address and its
    numbers stay. Nothing happens on other systems, to small tensors, and to memory shared with other processes.
    """
    # Sparse tensors and those of other classes may have no memory of their own.
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not is_plain or tensor.device.type != "cpu" or sys.platform != "linux":
        return False
    storage = tensor.untyped_storage()
    if storage.nbytes() < _LEAST or storage.is_shared():
        return False
    first = -(-storage.data_ptr() // _HUGE) * _HUGE
    length = (storage.data_ptr() + storage.nbytes()) // _HUGE * _HUGE - first
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if madvise(first, length, _MADV_HUGEPAGE) != 0:
        return False
    madvise(first, length, _MADV_COLLAPSE)
    return True


def zeros_in_huge_pages(like: Tensor) -> Tensor:
    """Return zeros in the shape of a tensor, in huge pages from the start where it is large."""
    zeros = torch.empty_like(like, memory_format=torch.preserve_format)
    use_huge_pages(zeros)
    return zeros.zero_()
