"""The orders in which gradient surgery visits tasks; the checks raise a UsageError."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError

__all__ = ["as_orders", "check_orders", "check_tasks"]


def check_orders(orders: Tensor, gram: Tensor) -> None:
    """Refuse what can be neither orders nor keys of orders for ``gram``; reads no entry."""
    tasks = gram.shape[-1]
    known = orders.dtype == torch.int64 or (orders.is_floating_point() and orders.shape[1:] == (tasks,))
    if orders.dim() != 2 or orders.shape[0] != tasks or not known:
        raise UsageError(
            f"orders must be int64 with {tasks} rows, one per task, or ({tasks}, {tasks}) float keys, "
            f"got shape {tuple(orders.shape)} and dtype {orders.dtype}."
        )
    if orders.device != gram.device:
        raise UsageError(f"orders must be on gram's device {gram.device}, got {orders.device}.")


def as_orders(orders: Tensor) -> Tensor:
    """Return int64 orders: those given, or the tasks by rising keys, equal ones by number and NaN last."""
    return orders.argsort(dim=1, stable=True) if orders.is_floating_point() else orders


def check_tasks(orders: Tensor) -> None:
    """Refuse orders with an entry that is no task; waits for the device."""
    if orders.is_floating_point() or not orders.numel():
        return
    least, most = int(orders.min()), int(orders.max())
    if least < 0 or most >= len(orders):
        raise UsageError(f"orders must hold tasks 0 .. {len(orders) - 1}, got {least} .. {most}.")
