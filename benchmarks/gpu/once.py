"""`python -m fastmtl.benchmarks.gpu.once gram`: one call of an op on a ResNet-18's gradients, for a profiler.

What is before the call, such as the gradients and the loading of the kernel, is outside the range that
``ncu --profile-from-start off`` looks at.
"""

from __future__ import annotations

import sys

import torch
from fastmtl.benchmarks.machine import wait_for
from fastmtl.benchmarks.registry import cases_of

__all__ = ["once"]


def once(op: str, device: torch.device) -> None:
    """Let the profiler see one call of our variants in the op's smallest cases."""
    for case in cases_of(op, device, quick=True):
        for name, variant in case.variants.items():
            if not name.startswith("fastmtl"):
                continue
            variant.call()
            wait_for(device)
            with torch.cuda.profiler.profile():
                variant.call()
                wait_for(device)


if __name__ == "__main__":
    once(sys.argv[1], torch.device("cuda"))
