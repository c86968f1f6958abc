"""Losses of tasks: a pure ``compute_loss`` and a running mean for the log.

Example::

    class LogCoshLoss(AbsLoss):
        def compute_loss(self, pred, gt):
            error = pred.flatten() - gt.flatten()
            return (error.abs() + torch.log1p(torch.exp(-2 * error.abs()))).mean() - math.log(2)
"""

from __future__ import annotations

from typing import NoReturn

from fastmtl._loss.base import AbsLoss
from fastmtl._loss.classes import CELoss, FocalLoss, SegLoss
from fastmtl._loss.columns import FirstColumn
from fastmtl._loss.entries import BCELoss, HuberLoss, KLDivLoss, L1Loss, MSELoss
from fastmtl._loss.maps import DepthLoss, NormalLoss
from fastmtl.errors import UsageError

__all__ = [
    "AbsLoss",
    "BCELoss",
    "CELoss",
    "DepthLoss",
    "FirstColumn",
    "FocalLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "NormalLoss",
    "SegLoss",
]

_FORMERLY = {"CE_loss_fn": "CELoss", "KL_loss_fn": "KLDivLoss", "L1_loss_fn": "L1Loss", "MSE_loss_fn": "MSELoss"}


def __getattr__(name: str) -> NoReturn:
    if name in _FORMERLY:
        raise UsageError(
            f"{name} is the class {_FORMERLY[name]}: write {{'loss_fn': {_FORMERLY[name]}()}} in place of [{name}]."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
