"""Scalarizers without memory: sums, means, random weights."""

from __future__ import annotations

from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.scalarization.base import Scalarizer, check_same_shape
from fastmtl.support.settings import vector_string
from fastmtl.weighting.rules import random_weights

__all__ = ["Constant", "GeometricMean", "Mean", "Random", "Sum"]


class Constant(Scalarizer):
    """The weighted sum of the losses.

    Args:
        weights: Of the shape of the losses.
    """

    settings = ("weights",)

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the weighted sum."""
        check_same_shape("weights", self.weights, values)
        return (self.weights * values).sum()

    def __str__(self) -> str:
        if self.weights.dim() == 1:
            return f"Constant([{vector_string(self.weights)}])"
        return f"Constant(weights of shape {tuple(self.weights.shape)})"


class GeometricMean(Scalarizer):
    """The geometric mean of the losses, which must not be negative.

    Source: Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning", CVPR Workshops 2019.
    """

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the mean.

        Raises:
            UsageError: A loss is negative.
        """
        if bool((values < 0).any()):
            raise UsageError("values must be at least 0 for a geometric mean, got a negative one.")
        # The mean of logarithms: the product of many small losses would underflow.
        return values.log().mean().exp()


class Mean(Scalarizer):
    """The mean of the losses."""

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the mean."""
        return values.mean()


class Random(Scalarizer):
    """The sum of the losses with positive random weights of sum one, new ones at each call.

    Source: Lin, Ye and Zhang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
    TMLR 2022.
    """

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the weighted sum."""
        return (random_weights(values.detach().flatten()).reshape(values.shape) * values).sum()


class Sum(Scalarizer):
    """The sum of the losses."""

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the sum."""
        return values.sum()
