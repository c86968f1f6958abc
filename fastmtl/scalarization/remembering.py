"""Scalarizers with state: numbers that an optimizer learns, or the losses of past epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.ops.famo import even_fall, even_fall_slope
from fastmtl.scalarization.base import Scalarizer, check_same_shape
from fastmtl.support.dtypes import falls_below
from fastmtl.support.settings import Declared, setting
from fastmtl.support.stateful import Stateful
from fastmtl.weighting.rules import descent_rates

__all__ = ["DWA", "FAMO", "IMTLL", "UW"]

_TINY = 1e-8


class Learned(Scalarizer, Stateful):
    """Base of scalarizers that learn one number for each of the losses of a ``shape``, in the ``parameter`` named."""

    settings: ClassVar[tuple[str, ...]] = ("shape",)
    parameter: ClassVar[str]

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.register_parameter(self.parameter, nn.Parameter(torch.zeros(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the losses."""
        return tuple(self.get_parameter(self.parameter).shape)

    @torch.no_grad()
    def reset(self) -> None:
        """Set all numbers to zero."""
        self.get_parameter(self.parameter).zero_()


class IMTLL(Learned):
    """``sum_i exp(s_i) L_i - s_i``: losses brought to the same scale; give ``parameters()`` to the optimizer.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021.
    """

    parameter = "log_scale"
    log_scale: Tensor

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the sum of the scaled losses less the logarithms of their scales."""
        check_same_shape("the scales", self.log_scale, values)
        return (self.log_scale.exp() * values - self.log_scale).sum()


class FAMO(Learned):
    """``c sum_i z_i log(L_i - min_losses_i)`` with weights z that make all losses fall at the same relative rate.

    c makes the update a convex combination of the losses' gradients. After the model's step, call :meth:`update` with
    the losses the same batch then has: Adam moves the logits of z by how much each fell.

    Args:
        shape: Shape of the losses.
        min_losses: Lower bounds of the losses; zeros if None.
        lr: Learning rate of the logits, at least 0.
        weight_decay: Their weight decay, at least 0.

    Raises:
        UsageError: A loss is below its bound. A loss equal to its bound takes no part.

    Source: Liu, Feng, Stone and Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023.
    """

    lr: float = setting(least=0)
    weight_decay: float = setting(least=0)
    settings = ("shape", "lr", "weight_decay")
    parameter = "_w"
    _w: nn.Parameter
    min_losses: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        min_losses: Tensor | None = None,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__(shape)
        self.lr = lr
        self.weight_decay = weight_decay
        bounds = torch.zeros(self.shape) if min_losses is None else min_losses
        if bounds.shape != self._w.shape:
            raise UsageError(f"min_losses must have the shape {self.shape}, got {tuple(bounds.shape)}.")
        self.register_buffer("min_losses", bounds)
        self._optimizer: torch.optim.Adam | None = None
        self._prev_losses: Tensor | None = None

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the weighted sum of the logarithms, and keep the losses for :meth:`update`."""
        check_same_shape("the logits", self._w, values)
        excess = values - self.min_losses
        if bool(falls_below(values.detach(), self.min_losses).any()):
            raise UsageError("values must be at least min_losses for FAMO, got one below its bound.")
        excess = excess.clamp(min=0)
        self._prev_losses = values.detach().clone()
        known = excess.detach()
        weights = even_fall(self._w.detach().flatten(), known.flatten(), torch.finfo(values.dtype).tiny)
        weights = weights.reshape(values.shape)
        return (weights * (known + _TINY) * (excess + _TINY).log()).sum()

    @torch.no_grad()
    def update(self, values: Tensor, /) -> None:
        """Move the weights by the losses of the batch after the model's step.

        Raises:
            UsageError: There was no call before, or ``values`` has another shape.
        """
        if self._prev_losses is None:
            raise UsageError("update must follow a call of the scalarizer with the losses before the step.")
        check_same_shape("the logits", self._w, values)
        before, after = (losses - self.min_losses for losses in (self._prev_losses, values.detach()))
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam([self._w], lr=self.lr, weight_decay=self.weight_decay)
        slope = even_fall_slope(self._w.flatten(), before.flatten(), after.flatten(), torch.finfo(before.dtype).tiny)
        # Losses that are NaN or infinite leave the logits as they are; Adam's momentum would still move them.
        finite, last = slope.isfinite().all(), self._w.clone()
        self._w.grad = torch.where(finite, slope, 0.0).reshape(self._w.shape)
        self._optimizer.step()
        self._w.copy_(torch.where(finite, self._w, last))
        # An optimizer that the user gave these logits to must not move them too.
        self._w.grad = None

    def reset(self) -> None:
        """Start from equal weights again."""
        super().reset()
        self._optimizer = None
        self._prev_losses = None


class UW(Learned):
    """``sum_i L_i / (2 exp(s_i)) + s_i / 2``: s_i is the log of a variance; give ``parameters()`` to the optimizer.

    Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", CVPR 2018.
    """

    parameter = "log_var"
    log_var: Tensor

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the sum of the losses over their variances, with the penalty."""
        check_same_shape("the variances", self.log_var, values)
        return 0.5 * (torch.exp(-self.log_var) * values + self.log_var).sum()


class DWA(Declared, Scalarizer, Stateful):
    """A weighted sum in which losses that fall slowly count more.

    From the third epoch on the weights are T times the softmax of ``r / temperature``, r_i the ratio of the mean losses
    of the last two epochs; ones before. Call :meth:`step` at the end of each epoch.

    Args:
        temperature: Positive: the higher, the more equal the weights.

    Raises:
        UsageError: The shape of the losses changed since :meth:`reset`.

    Source: Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019.
    """

    temperature: float = setting(default=2.0, above=0)

    def reset(self) -> None:
        """Forget all losses."""
        self._loss_sum: Tensor | None = None
        self._n_batches = 0
        self._previous_averages: list[Tensor] = []

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the weighted sum and remember the losses."""
        known = self._loss_sum if not self._previous_averages else self._previous_averages[-1]
        if known is not None and known.shape != values.shape:
            raise UsageError(
                f"values must keep the shape {tuple(known.shape)} until reset() is called, got {tuple(values.shape)}."
            )
        detached = values.detach()
        self._loss_sum = detached.clone() if self._loss_sum is None else self._loss_sum + detached
        self._n_batches += 1
        if len(self._previous_averages) < 2:
            return values.sum()
        older, newer = self._previous_averages
        weights = descent_rates(newer.flatten(), older.flatten(), self.temperature)
        return (weights.reshape(values.shape) * values).sum()

    def step(self) -> None:
        """End the epoch."""
        if self._loss_sum is not None:
            self._previous_averages = [*self._previous_averages, self._loss_sum / self._n_batches][-2:]
        self._loss_sum, self._n_batches = None, 0
