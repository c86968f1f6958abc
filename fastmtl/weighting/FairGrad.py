"""Fair resource allocation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights

__all__ = ["Fair", "FairGrad"]


class Fair(AbsWeighting):
    """Base of strategies whose weights solve ``G w = w^(-1/alpha)``, each time from the last solution on."""

    needs = "gram"
    weighs_heads = True
    allows_rep_grad = False
    last_weights: Tensor

    def init_param(self) -> None:
        """Create the last solution, from which the next one starts."""
        self.remember("last_weights", torch.ones(self.task_num, dtype=torch.float64))

    def settled(self, weights: Tensor, max_norm: float | None = None) -> Weights:
        """Return a solution as the weights, of decoders too, and remember it.

        With groups of parameters, a decoder's weight is the mean over the groups that its task reaches.
        A task without a shared gradient has weight 0; its decoder gets weight 1, since beside a frozen encoder, or with
        weights that start at zero, it would otherwise learn nothing.
        """
        self.last_weights.copy_(weights)
        heads = weights.masked_fill(weights == 0, 1 if weights.dim() == 1 else torch.nan)
        return Weights(shared=weights, heads=heads, max_norm=max_norm)


class FairGrad(Fair):
    """FairGrad: alpha-fair allocation of the improvement, weights w > 0 with ``G w = w^(-1/alpha)``.

    See :func:`fastmtl.ops.fairgrad`.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024.
    """

    takes_groups = True
    hyper = {  # noqa: RUF012
        "FairGrad_alpha": Hyper(
            type=float, default=1.0, above=0.0, help="Fairness: 1 is proportional, towards infinity max-min."
        )
    }

    def weigh(self, losses: Tensor, gram: Tensor, *, FairGrad_alpha: float = 1.0, **hyper: object) -> Weights:
        """Return the alpha-fair weights, of decoders too."""
        return self.settled(ops.fairgrad(gram, FairGrad_alpha, self.last_weights))
