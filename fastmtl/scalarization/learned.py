"""Scalarizers with parameters that an optimizer trains together with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastmtl.scalarization.base import Scalarizer, check_same_shape
from fastmtl.support.stateful import Stateful

__all__ = ["IMTLL", "UW", "Learned"]


class Learned(Scalarizer, Stateful):
    """Base of scalarizers that learn one number for each loss.

    Args:
        shape: Shape of the losses.
    """

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

    Args:
        shape: Shape of the losses.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021.
    """

    parameter = "log_scale"
    log_scale: Tensor

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the scalar."""
        check_same_shape("the scales", self.log_scale, values)
        return (self.log_scale.exp() * values - self.log_scale).sum()


class UW(Learned):
    """``sum_i L_i / (2 exp(s_i)) + s_i / 2``: s_i is the log of a variance; give ``parameters()`` to the optimizer.

    Args:
        shape: Shape of the losses.

    Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", CVPR 2018.
    """

    parameter = "log_var"
    log_var: Tensor

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the scalar."""
        check_same_shape("the variances", self.log_var, values)
        return 0.5 * (torch.exp(-self.log_var) * values + self.log_var).sum()
