"""Weights that do not depend on the gradients: equal, given or random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.aggregation.base import MatrixWeighting, WeightedAggregator
from fastmtl.errors import UsageError
from fastmtl.support.settings import Declared, vector_string
from fastmtl.weighting.rules import random_weights

__all__ = [
    "Constant",
    "ConstantWeighting",
    "Mean",
    "MeanWeighting",
    "Random",
    "RandomWeighting",
    "Sum",
    "SumWeighting",
]


def equal_weights(matrix: Tensor) -> Tensor:
    """Return T weights 1 / T in the dtype of a matrix of T rows."""
    return torch.full_like(matrix[:, :0].sum(1), 1 / max(len(matrix), 1))


class ConstantWeighting(MatrixWeighting):
    """The same weights at each call.

    Args:
        weights: (T,).

    Raises:
        UsageError: ``weights`` is not one-dimensional, or a matrix has another number of rows.
    """

    settings = ("weights",)

    def __init__(self, weights: Tensor) -> None:
        if weights.dim() != 1:
            raise UsageError(f"weights must have the shape (T,), got {tuple(weights.shape)}.")
        super().__init__()
        self.weights = weights

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the given weights."""
        if len(matrix) != len(self.weights):
            raise UsageError(f"matrix must have {len(self.weights)} rows, one per weight, got {len(matrix)}.")
        return self.weights


class MeanWeighting(MatrixWeighting):
    """Weights 1 / T."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return T weights 1 / T."""
        return equal_weights(matrix)


class SumWeighting(MatrixWeighting):
    """Weights 1."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return T ones."""
        return torch.ones_like(matrix[:, :0].sum(1))


class RandomWeighting(MatrixWeighting):
    """Positive random weights that sum to one, new ones at each call.

    Source: Lin, Ye and Zhang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
    TMLR 2022.
    """

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return new random weights."""
        return random_weights(matrix[:, :0].sum(1))


class Constant(Declared, WeightedAggregator[ConstantWeighting], of=ConstantWeighting):
    """A linear combination with given weights.

    Args:
        weights: (T,).
    """

    weights: Tensor

    def __str__(self) -> str:
        return f"Constant([{vector_string(self.weights)}])"


class Mean(WeightedAggregator[MeanWeighting]):
    """The mean of the gradients."""

    def __init__(self) -> None:
        super().__init__(MeanWeighting())


class Sum(WeightedAggregator[SumWeighting]):
    """The sum of the gradients."""

    def __init__(self) -> None:
        super().__init__(SumWeighting())


class Random(WeightedAggregator[RandomWeighting]):
    """A random convex combination of the gradients; see :class:`RandomWeighting`."""

    def __init__(self) -> None:
        super().__init__(RandomWeighting())
