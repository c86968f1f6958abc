"""Aggregators whose weights follow from the Gram matrix alone, most by one op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.aggregation.base import GramianWeightedAggregator, GramWeighting
from fastmtl.errors import UsageError
from fastmtl.linalg import normalized
from fastmtl.support.settings import Declared, setting

__all__ = [
    "IMTLG",
    "MGDA",
    "CAGrad",
    "CAGradWeighting",
    "FairGrad",
    "FairGradWeighting",
    "IMTLGWeighting",
    "Krum",
    "KrumWeighting",
    "MGDAWeighting",
    "PCGrad",
    "PCGradWeighting",
]


class CAGradWeighting(GramWeighting):
    """Weights of CAGrad's update; see :func:`fastmtl.ops.cagrad_update`.

    Args:
        c: Radius around the mean gradient, relative to its length.
        norm_eps: Where the trace of G is below it, or |g_w| of the G divided by its trace, all weights are zero.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021.
    """

    takes_groups = True
    c: float = setting(least=0)
    norm_eps: float = setting(default=0.0001, least=0)

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights of CAGrad's update."""
        matrix = normalized(gram, self.norm_eps)
        weights, update = ops.cagrad_update(matrix, self.c).unbind(-2)
        length = torch.einsum("...s,...st,...t->...", weights, matrix, weights).clamp(min=0).sqrt()[..., None]
        return torch.where(length < self.norm_eps, 0.0, update)


class CAGrad(Declared, GramianWeightedAggregator[CAGradWeighting], of=CAGradWeighting):
    """The direction near the mean gradient that is best for the worst task; see :class:`CAGradWeighting`."""

    c: float
    norm_eps: float = CAGradWeighting.norm_eps

    def __str__(self) -> str:
        return f"CAGrad{str(self.c).removesuffix('.0')}"


class FairGradWeighting(GramWeighting):
    """Weights w > 0 with ``G w = w^(-1/alpha)``; see :func:`fastmtl.ops.fairgrad`.

    Args:
        alpha: Fairness, at least 0: 0 is the mean, 1 proportional, towards infinity max-min.
        max_iters: Has no effect, as the solution is exact; TorchJD has it.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024.
    """

    takes_groups = True
    alpha: float = setting(least=0)
    max_iters: int | None = setting(default=None)

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the alpha-fair weights."""
        if self.alpha == 0:
            return torch.full_like(gram[..., 0, :], 1 / gram.shape[-1])
        return ops.fairgrad(gram, self.alpha)


class FairGrad(Declared, GramianWeightedAggregator[FairGradWeighting], of=FairGradWeighting):
    """The alpha-fair update; see :class:`FairGradWeighting`."""

    alpha: float
    max_iters: int | None = FairGradWeighting.max_iters

    def __str__(self) -> str:
        return f"{self.alpha}-FairGrad"


class IMTLGWeighting(GramWeighting):
    """Weights, with sum one, of the update that projects equally onto all gradients; see :func:`fastmtl.ops.imtl`.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021.
    """

    takes_groups = True

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the weights of equal projections."""
        return ops.imtl(gram)


class IMTLG(GramianWeightedAggregator[IMTLGWeighting]):
    """The update that projects equally onto all gradients; see :class:`IMTLGWeighting`."""

    def __init__(self) -> None:
        super().__init__(IMTLGWeighting())


class KrumWeighting(GramWeighting):
    """Equal weights of the gradients that are closest to their neighbours.

    The score of a gradient is the sum of its distances to the ``T - n_byzantine - 2`` nearest others; the
    ``n_selected`` with the lowest scores are averaged.

    Args:
        n_byzantine: How many gradients may be arbitrary.
        n_selected: How many are averaged.

    Raises:
        UsageError: Fewer than ``n_byzantine + 3`` or ``n_selected`` gradients.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.
    """

    n_byzantine: int = setting(least=0)
    n_selected: int = setting(default=1, least=1)

    def weigh(self, gram: Tensor) -> Tensor:
        """Return equal weights of the selected gradients, 0 of the others."""
        size, least = len(gram), max(self.n_byzantine + 3, self.n_selected)
        if size < least:
            raise UsageError(
                f"Krum needs at least {least} rows with n_byzantine={self.n_byzantine} and "
                f"n_selected={self.n_selected}, got {size}."
            )
        square = gram.diagonal()
        distance = (square[:, None] + square - 2 * gram).clamp(min=0).sqrt()
        # A gradient is its own nearest one, but rounding may say otherwise.
        distance.fill_diagonal_(torch.inf)
        scores = distance.sort(dim=1).values[:, : size - self.n_byzantine - 2].sum(1)
        chosen = scores.topk(self.n_selected, largest=False).indices
        return torch.zeros_like(scores).index_fill(0, chosen, 1 / self.n_selected)


class Krum(Declared, GramianWeightedAggregator[KrumWeighting], of=KrumWeighting):
    """The mean of the gradients that are closest to their neighbours; see :class:`KrumWeighting`."""

    n_byzantine: int
    n_selected: int = KrumWeighting.n_selected

    def __str__(self) -> str:
        return f"Krum{self.n_byzantine}-{self.n_selected}"


class MGDAWeighting(GramWeighting):
    """Weights of the shortest convex combination of the gradients; see :func:`fastmtl.ops.min_norm`.

    The solution is exact, so the arguments, which stop TorchJD's approximation, have no effect.

    Args:
        epsilon: Positive.
        max_iters: Positive.

    Source: Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", 2012.
    """

    takes_groups = True
    epsilon: float = setting(default=0.001, above=0)
    max_iters: int = setting(default=100, above=0)

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the min-norm weights."""
        return ops.min_norm(gram)


class MGDA(Declared, GramianWeightedAggregator[MGDAWeighting], of=MGDAWeighting):
    """The shortest convex combination of the gradients; see :class:`MGDAWeighting`."""

    epsilon: float = MGDAWeighting.epsilon
    max_iters: int = MGDAWeighting.max_iters


class PCGradWeighting(GramWeighting):
    """Weights of PCGrad's update, in a new random order of the tasks at each call; see :func:`fastmtl.ops.pcgrad`.

    Groups of parameters have the same order.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.
    """

    takes_groups = True

    def weigh(self, gram: Tensor) -> Tensor:
        """Return the sums of the projected gradients' coefficients."""
        return ops.pcgrad(gram, torch.rand_like(gram if gram.dim() == 2 else gram[0]))


class PCGrad(GramianWeightedAggregator[PCGradWeighting]):
    """The sum of the gradients, each projected off those it conflicts with; see :class:`PCGradWeighting`."""

    def __init__(self) -> None:
        super().__init__(PCGradWeighting())
