"""Scalarizers without memory: sums, means, random weights, and those that steer towards a preferred trade-off."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.scalarization.base import Scalarizer, check_same_shape
from fastmtl.support.dtypes import falls_below
from fastmtl.support.settings import at_least, positive, vector_string
from fastmtl.weighting.rules import counted, random_weights

__all__ = ["COSMOS", "PBI", "STCH", "Constant", "GeometricMean", "Mean", "Random", "Sum"]


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
    """The geometric mean of the losses that are not 0: at 0 it has no derivative.

    Raises:
        UsageError: A loss is negative.

    Source: Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning", CVPR Workshops 2019.
    """

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the mean."""
        if bool(falls_below(values.detach(), 0.0).any()):
            raise UsageError("values must be at least 0 for a geometric mean, got a negative one.")
        known = counted(values)
        # The mean of logarithms: the product of many small losses would underflow.
        mean = torch.where(known, values, 1.0).log().sum() / known.sum().clamp(min=1)
        return torch.where(known.any(), mean.exp(), values.sum())


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


class COSMOS(Scalarizer):
    """``sum_i r_i L_i - lambda_ cos(r, L)``: a weighted sum, and a reward for losses along the preferred direction.

    Args:
        lambda_: Size of the reward, at least 0.
        weights: r, of the shape of the losses.

    Source: Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", ICDM 2021.
    """

    settings = ("lambda_", "weights")
    lambda_ = at_least(0.0)

    def __init__(self, lambda_: float, weights: Tensor) -> None:
        super().__init__()
        self.lambda_ = lambda_
        self.weights = weights

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the scalar."""
        check_same_shape("weights", self.weights, values)
        cosine = torch.nn.functional.cosine_similarity(self.weights.flatten(), values.flatten(), dim=0)
        return (self.weights * values).sum() - self.lambda_ * cosine


class _Referred(Scalarizer):
    """Base of scalarizers of the losses' distance from ideal ones."""

    weights: Tensor | None

    def __init__(self, weights: Tensor | None, reference: Tensor | None) -> None:
        super().__init__()
        self.weights = weights
        self.reference = reference

    def _beyond(self, values: Tensor) -> Tensor:
        """Return how far the losses are from the ideal ones; their shape and that of the weights must be the same."""
        check_same_shape("weights", self.weights, values)
        check_same_shape("reference", self.reference, values)
        return values if self.reference is None else values - self.reference


class PBI(_Referred):
    """``d_1 + theta d_2``: the losses' distance along the preferred direction, and a penalty on that from it.

    With ``v = L - reference`` and the unit vector u of ``weights``: ``d_1 = <v, u>`` and ``d_2 = |v - d_1 u|``.

    Args:
        theta: The penalty, at least 0.
        weights: The direction, of the shape of the losses.
        reference: The ideal losses; zeros if None.

    Source: Zhang and Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE Transactions on
    Evolutionary Computation 2007.
    """

    settings = ("theta", "weights", "reference")
    theta = at_least(0.0)
    weights: Tensor

    def __init__(self, theta: float, weights: Tensor, reference: Tensor | None = None) -> None:
        super().__init__(weights, reference)
        self.theta = theta

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the scalar."""
        vector = self._beyond(values).flatten()
        unit = self.weights.flatten() / self.weights.norm()
        along = vector @ unit
        across = vector - along * unit
        # The root has no derivative at 0, where the losses lie on the direction.
        return along + self.theta * (across @ across + 1e-12).sqrt()


class STCH(_Referred):
    """``mu log sum_i exp(w_i (L_i - reference_i) / mu)``: a smooth form of the greatest weighted loss.

    Args:
        mu: Smoothing, positive: towards 0 only the greatest counts.
        weights: w, of the shape of the losses; equal ones with sum one if None.
        reference: The ideal losses; zeros if None.

    Source: Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024.
    """

    settings = ("mu", "weights", "reference")
    mu = positive(float)

    def __init__(self, mu: float, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        super().__init__(weights, reference)
        self.mu = mu

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the scalar."""
        shifted = self._beyond(values)
        weighted = shifted / values.numel() if self.weights is None else self.weights * shifted
        # Relative to the greatest one, so that the division by a small mu does not overflow.
        greatest = weighted.max()
        return self.mu * torch.logsumexp((weighted - greatest).flatten() / self.mu, dim=0) + greatest
