"""The multiple gradient descent algorithm."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import GramianWeightedAggregator, GramWeighting
from fastmtl.support.settings import Through, positive

__all__ = ["MGDA", "MGDAWeighting"]


class MGDAWeighting(GramWeighting):
    """Weights of the shortest convex combination of the gradients; see :func:`fastmtl.ops.min_norm`.

    The solution is exact, so that the arguments, which stop TorchJD's approximation, change nothing.

    Args:
        epsilon: Positive.
        max_iters: Positive.

    Source: Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", 2012.
    """

    settings = ("epsilon", "max_iters")
    epsilon = positive(float)
    max_iters = positive(int)

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.max_iters = max_iters

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights."""
        return ops.min_norm(gram)


class MGDA(GramianWeightedAggregator):
    """The shortest convex combination of the gradients; see :class:`MGDAWeighting`."""

    settings = ("epsilon", "max_iters")
    gramian_weighting: MGDAWeighting
    epsilon: Through[float] = Through()
    max_iters: Through[int] = Through()

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        super().__init__(MGDAWeighting(epsilon, max_iters))
