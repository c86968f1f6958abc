"""Bargaining between tasks."""

from __future__ import annotations

from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import Hyper, Weights
from fastmtl.weighting.FairGrad import Fair

__all__ = ["Nash_MTL"]


class Nash_MTL(Fair):
    """Nash-MTL: the Nash bargaining solution, weights w > 0 with ``G w = 1 / w``; see :func:`fastmtl.ops.nash`.

    The solution is exact, so ``optim_niter``, the number of steps of LibMTL's approximation, has no effect.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022.
    """

    takes_groups = True
    hyper = {  # noqa: RUF012
        "update_weights_every": Hyper(type=int, default=1, least=1, help="Steps between two bargains."),
        "optim_niter": Hyper(type=int, default=20, help="Has no effect, as the solution is exact; LibMTL has it."),
        "max_norm": Hyper(type=float, default=1.0, least=0.0, help="Greatest norm of the shared update; 0 for none."),
    }

    def weigh(self, losses: Tensor, gram: Tensor, *, max_norm: float = 1.0, **hyper: object) -> Weights:
        """Return the bargain's weights, of decoders too."""
        return self.settled(ops.nash(gram, self.last_weights), max_norm if max_norm > 0 else None)
