"""The C library's treatment of freed memory."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_BLOCK = 32 << 20  # the most glibc allows: half of a heap of 64 MiB
_NEVER = -1
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
