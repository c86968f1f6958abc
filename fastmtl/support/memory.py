"""What the C library does with memory that is freed."""

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
    """Let the process keep memory a training step on the CPU frees, so that the next step finds it.

    A step frees the gradients of all tasks at its end. glibc hands that much back to the system, which then gives the
    next step pages of zeros, one fault for every 4 KiB: for three tasks and a ResNet-18 20,000 a step. Blocks of up
    to 32 MiB are kept from now on. Returns whether it was arranged: not where the C library is another one, nor where
    the environment says what to do.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
