"""Operators on lists of task gradients and on their Gram matrix.

Every op runs on the fastest backend there is for its device: C++ (``cpp``), CUDA C++ (``cuda``), Triton (``triton``) or
plain torch (``reference``). ``FASTMTL_BACKEND`` forces one.
"""

from __future__ import annotations

from fastmtl.ops._registry import backend_report, implementation
from fastmtl.ops.aligned import aligned
from fastmtl.ops.cagrad import cagrad, cagrad_update
from fastmtl.ops.combine import combine, combine_
from fastmtl.ops.config import config
from fastmtl.ops.dual_cone import dual_cone
from fastmtl.ops.fairgrad import fairgrad
from fastmtl.ops.gradvac import gradvac
from fastmtl.ops.gram import gram
from fastmtl.ops.imtl import imtl
from fastmtl.ops.min_norm import min_norm
from fastmtl.ops.nash import nash
from fastmtl.ops.nonneg_qp import nonneg_qp
from fastmtl.ops.pcgrad import pcgrad
from fastmtl.ops.upgrad import upgrad

__all__ = [
    "aligned",
    "backend_report",
    "cagrad",
    "cagrad_update",
    "combine",
    "combine_",
    "config",
    "dual_cone",
    "fairgrad",
    "gradvac",
    "gram",
    "implementation",
    "imtl",
    "min_norm",
    "nash",
    "nonneg_qp",
    "pcgrad",
    "upgrad",
]
