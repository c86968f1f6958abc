"""Bargaining between tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.support.hyper import Hyper
from fastmtl.weighting.base import AbsWeighting, Weights
from fastmtl.weighting.rules import heads_beside

__all__ = ["Nash_MTL"]


class Nash_MTL(AbsWeighting):
    """Nash-MTL: the Nash bargaining solution, weights w > 0 with ``G w = 1 / w``; see :func:`fastmtl.ops.nash`.

    The solution is exact, so that ``optim_niter``, the steps of LibMTL's approximation, changes nothing here.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022.
    """

    needs = "gram"
    weighs_heads = True
    allows_rep_grad = False
    hyper = {  # noqa: RUF012
        "update_weights_every": Hyper(type=int, default=1, least=1, help="Steps between two bargains."),
        "optim_niter": Hyper(type=int, default=20, help="Taken for LibMTL's sake; the solution is exact."),
        "max_norm": Hyper(type=float, default=1.0, least=0.0, help="Greatest norm of the shared update; 0 for none."),
    }

    last_weights: Tensor

    def init_param(self) -> None:
        """Create the last solution, from which the next one starts."""
        self.remember("last_weights", torch.ones(self.task_num, dtype=torch.float64))

    def weigh(self, losses: Tensor, gram: Tensor | None, *, max_norm: float = 1.0, **hyper: object) -> Weights:
        """Return the weights, of decoders too."""
        assert gram is not None
        weights = ops.nash(gram, self.last_weights)
        self.last_weights.copy_(weights)
        return Weights(shared=weights, heads=heads_beside(weights), max_norm=max_norm if max_norm > 0 else None)
