"""Scalarizers with parameters that an optimizer trains together with the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.scalarization.base import Scalarizer, check_same_shape
from fastmtl.support.stateful import Stateful

__all__ = ["IMTLL", "UW"]


class IMTLL(Scalarizer, Stateful):
    """``sum_i exp(s_i) L_i - s_i``: losses brought to the same scale; give ``parameters()`` to the optimizer.

    Args:
        shape: Shape of the losses.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021.
    """

    settings = ("shape",)

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the losses."""
        return tuple(self.log_scale.shape)

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the scalar."""
        check_same_shape("the scales", self.log_scale, values)
        return (self.log_scale.exp() * values - self.log_scale).sum()

    @torch.no_grad()
    def reset(self) -> None:
        """Set all s to zero."""
        self.log_scale.zero_()


class UW(Scalarizer, Stateful):
    """``sum_i L_i / (2 exp(s_i)) + s_i / 2``: s_i is the log of a variance; give ``parameters()`` to the optimizer.

    Args:
        shape: Shape of the losses.

    Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", CVPR 2018.
    """

    settings = ("shape",)

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the losses."""
        return tuple(self.log_var.shape)

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the scalar."""
        check_same_shape("the variances", self.log_var, values)
        return 0.5 * (torch.exp(-self.log_var) * values + self.log_var).sum()

    @torch.no_grad()
    def reset(self) -> None:
        """Set all s to zero."""
        self.log_var.zero_()
