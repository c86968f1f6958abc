"""Scalarizers without state: sums, means, random weights, and those that prefer a trade-off."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.scalarization.base import Scalarizer, check_same_shape
from fastmtl.support.dtypes import falls_below
from fastmtl.support.settings import Declared, setting, vector_string
from fastmtl.weighting.rules import counted, geometric_mean, random_weights

__all__ = ["COSMOS", "PBI", "STCH", "Constant", "GeometricMean", "Mean", "Random", "Sum"]


class Constant(Declared, Scalarizer):
    """The weighted sum of the losses.

    Args:
        weights: Of the shape of the losses.
    """

    weights: Tensor = setting()

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
        """Return the geometric mean."""
        if bool(falls_below(values.detach(), 0.0).any()):
            raise UsageError("values must be at least 0 for a geometric mean, got a negative one.")
        known = counted(values)
        return torch.where(known.any(), geometric_mean(values, known), values.sum())


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


class COSMOS(Declared, Scalarizer):
    """``sum_i r_i L_i - lambda_ cos(r, L)``: a weighted sum, and a reward for losses along the preferred direction.

    Args:
        lambda_: Size of the reward, at least 0.
        weights: r, of the shape of the losses.

    Source: Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", ICDM 2021.
    """

    lambda_: float = setting(least=0)
    weights: Tensor = setting()

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the weighted sum less the reward."""
        check_same_shape("weights", self.weights, values)
        cosine = torch.nn.functional.cosine_similarity(self.weights.flatten(), values.flatten(), dim=0)
        return (self.weights * values).sum() - self.lambda_ * cosine


def _distance(values: Tensor, weights: Tensor | None, reference: Tensor | None) -> Tensor:
    """Return how far the losses are above the ideal ones; weights and ideal losses must have their shape."""
    check_same_shape("weights", weights, values)
    check_same_shape("reference", reference, values)
    return values if reference is None else values - reference


class PBI(Declared, Scalarizer):
    """``d_1 + theta d_2``: the losses' distance along the preferred direction, and a penalty on that from it.

    With ``v = L - reference`` and the unit vector u of ``weights``: ``d_1 = <v, u>`` and ``d_2 = |v - d_1 u|``.

    Args:
        theta: The penalty, at least 0.
        weights: The direction, of the shape of the losses.
        reference: The ideal losses; zeros if None.

    Source: Zhang and Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE Transactions on
    Evolutionary Computation 2007.
    """

    theta: float = setting(least=0)
    weights: Tensor = setting()
    reference: Tensor | None = setting(default=None)

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the boundary intersection."""
        vector = _distance(values, self.weights, self.reference).flatten()
        unit = self.weights.flatten() / self.weights.norm()
        along = vector @ unit
        across = vector - along * unit
        # The root has no derivative at 0, where the losses lie on the direction.
        return along + self.theta * (across @ across + 1e-12).sqrt()


class STCH(Declared, Scalarizer):
    """``mu log sum_i exp(w_i (L_i - reference_i) / mu)``: a smooth form of the greatest weighted loss.

    Args:
        mu: Smoothing, positive: towards 0 only the greatest counts.
        weights: w, of the shape of the losses; equal ones with sum one if None.
        reference: The ideal losses; zeros if None.

    Source: Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024.
    """

    mu: float = setting(above=0)
    weights: Tensor | None = setting(default=None)
    reference: Tensor | None = setting(default=None)

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the smooth maximum."""
        shifted = _distance(values, self.weights, self.reference)
        weighted = shifted / values.numel() if self.weights is None else self.weights * shifted
        # Relative to the greatest one, so that the division by a small mu does not overflow.
        greatest = weighted.max()
        return self.mu * torch.logsumexp((weighted - greatest).flatten() / self.mu, dim=0) + greatest
