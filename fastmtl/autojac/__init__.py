"""Jacobians of several losses in a plain PyTorch loop, by TorchJD's names.

``backward`` and ``mtl_backward`` take the place of ``loss.backward()`` and fill ``.jac`` fields; ``jac_to_grad`` turns
those into ``.grad`` with an aggregator of :mod:`fastmtl.aggregation`.

Importing this package turns torch's donated buffers off, so that functions compiled afterwards can be differentiated
once per task.
"""

from __future__ import annotations

from fastmtl.autojac.backward import backward
from fastmtl.autojac.jac import jac
from fastmtl.autojac.jac_to_grad import jac_to_grad
from fastmtl.autojac.mtl_backward import mtl_backward
from fastmtl.engine.repeated import allow_repeated_backwards

__all__ = ["backward", "jac", "jac_to_grad", "mtl_backward"]

allow_repeated_backwards()
