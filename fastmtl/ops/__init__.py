"""Operators on lists of task gradients and on their Gram matrix.

Every op runs on the fastest backend there is for its device: C++ (``cpp``), CUDA C++ (``cuda``), Triton (``triton``) or
plain torch (``reference``). ``FASTMTL_BACKEND`` forces one; an op raises :class:`fastmtl.errors.BackendError` where the
backend that is named cannot serve its tensors. Arguments of a wrong shape, dtype, device or range, or that do not fit
together, raise :class:`fastmtl.errors.UsageError`; the message names them.

Ops on rows take the gradients of T tasks, as many as there are, as :func:`gram` does. Kernels take up to 128; more are
taken in blocks, which is slower, and a warning of the logger ``fastmtl`` says so once. :func:`gram`, :func:`combine`
and :func:`graddrop_rows` also take sparse gradients, of embedding tables: only the table's rows that some gradient
touches are read (:func:`group_rows`, :func:`sum_rows`).

Ops on a symmetric (T, T) Gram matrix G of the gradients take it as :func:`gram` returns it, and convert it to float64
if need be. Unless they say otherwise, they return (T,) float64 weights on its device, all NaN for a NaN or infinity in
G, and their bounds hold for a G that is positive semidefinite up to float64 rounding, whatever the scales of its rows;
a coarser G is solved to its own rounding. Where there are several solutions (linearly dependent gradients), one of them
is returned, the same each time. Their kernels run in float64 without waiting for the device and always end after a
bounded number of steps. On MPS, which has no float64, they are solved on the CPU, and the results of all ops that would
be float64 are float32.
"""

from __future__ import annotations

from fastmtl.ops._registry import backend_report, implementation
from fastmtl.ops.aligned import aligned
from fastmtl.ops.cagrad import cagrad, cagrad_update
from fastmtl.ops.cap_norm import cap_norm
from fastmtl.ops.combine import combine, combine_
from fastmtl.ops.config import config
from fastmtl.ops.dual_cone import dual_cone
from fastmtl.ops.ema_gram import ema_gram_
from fastmtl.ops.excess_risk import excess_risk_
from fastmtl.ops.fairgrad import fairgrad
from fastmtl.ops.famo import famo_step_, famo_weights
from fastmtl.ops.graddrop import graddrop, graddrop_rows
from fastmtl.ops.gradvac import gradvac
from fastmtl.ops.gram import gram
from fastmtl.ops.imtl import imtl
from fastmtl.ops.min_norm import min_norm
from fastmtl.ops.moco import moco_rates_, moco_step_
from fastmtl.ops.nash import nash
from fastmtl.ops.nonneg_qp import nonneg_qp
from fastmtl.ops.pcgrad import pcgrad
from fastmtl.ops.tables import group_rows, sum_rows
from fastmtl.ops.upgrad import upgrad
from fastmtl.ops.watch import watch_

__all__ = [
    "aligned",
    "backend_report",
    "cagrad",
    "cagrad_update",
    "cap_norm",
    "combine",
    "combine_",
    "config",
    "dual_cone",
    "ema_gram_",
    "excess_risk_",
    "fairgrad",
    "famo_step_",
    "famo_weights",
    "graddrop",
    "graddrop_rows",
    "gradvac",
    "gram",
    "group_rows",
    "implementation",
    "imtl",
    "min_norm",
    "moco_rates_",
    "moco_step_",
    "nash",
    "nonneg_qp",
    "pcgrad",
    "sum_rows",
    "upgrad",
    "watch_",
]
