"""A weighted mean kept on the device."""

from __future__ import annotations

import math
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fastmtl.support.dtypes import wide_dtype

__all__ = ["Group", "RunningMean"]

T = TypeVar("T")


class Group(Protocol):
    """The processes with parts of a sum, see :class:`fastmtl.distributed.Peers`."""

    def all_gather_object(self, value: T) -> list[T]:
        """Return the value of each process."""

    def all_reduce_optional(self, tensor: Tensor | None) -> Tensor | None:
        """Return the sum of a tensor that may be None in some processes; None if it is in all."""


class RunningMean:
    """Weighted mean of scalars, ``sum_i w_i v_i / sum_i w_i``, accumulated on their device.

    ``add`` never waits for the device; only ``value`` does. Sums are float64, or float32 where the device has no
    float64. The first value decides the device.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._weight: float | Tensor = 0.0

    def add(self, value: Tensor, weight: float | Tensor) -> None:
        """Add a tensor with one element, with a weight that is a number or a scalar tensor."""
        value = value.detach().reshape(())
        if self._total is None:
            self._total = torch.zeros((), dtype=wide_dtype(value.device), device=value.device)
        product = value.to(self._total.dtype) * weight
        # The mean of nothing may be NaN.
        if isinstance(weight, Tensor):
            product = torch.where(weight.to(product.device, non_blocking=True) == 0, 0, product)
        elif weight == 0:
            product = torch.zeros_like(product)
        self._total = self._total + product
        # A number plus an integer tensor would be float32, which is exact only up to 2**24.
        self._weight = self._weight + (
            weight.detach().to(wide_dtype(weight.device)) if isinstance(weight, Tensor) else weight
        )

    def add_each(self, values: Tensor, weights: Tensor) -> None:
        """Add values (n,) with weights (n,), as n calls of :meth:`add` do."""
        values = values.detach()
        dtype = wide_dtype(values.device)
        if self._total is None:
            self._total = torch.zeros((), dtype=dtype, device=values.device)
        weights = weights.to(values.device, dtype)
        products = torch.where(weights == 0, 0, values.to(dtype) * weights)
        before = self._weight if isinstance(self._weight, Tensor) else torch.full_like(self._total, self._weight)
        before = before.to(values.device, dtype)
        # On the CPU one after the other, so that it does not matter how many come at once.
        sums = torch.stack([torch.cat([self._total[None], products]), torch.cat([before[None], weights])]).cumsum(1)
        self._total, self._weight = sums[:, -1].unbind()

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last ``reset``."""
        return self._total is None

    @property
    def weightless(self) -> bool:
        """Whether all that was added has a weight of 0; waits for the device."""
        return not self.empty and float(self._weight) == 0

    def value(self) -> float:
        """The mean, NaN if all weights are 0; waits for the device. Raises ``ZeroDivisionError`` when empty."""
        if self._total is None:
            raise ZeroDivisionError("the mean of no values")
        weight = float(self._weight)
        return self._total.item() / weight if weight else math.nan

    def state(self) -> tuple[Tensor | None, float | Tensor]:
        """Return the sums, for :meth:`restore`."""
        return self._total, self._weight

    def on_host(self) -> tuple[Tensor | None, float | Tensor]:
        """Return the sums in the host's memory, which waits for them."""
        total, weight = self._total, self._weight
        return None if total is None else total.cpu(), weight.cpu() if isinstance(weight, Tensor) else weight

    def restore(self, state: tuple[Tensor | None, float | Tensor]) -> None:
        """Restore the sums of a :meth:`state`."""
        self._total, self._weight = state

    def reset(self) -> None:
        """Reset sums and device."""
        self._total = None
        self._weight = 0.0
