"""Gradient vaccine."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.weighting.abstract_weighting import Hyper, Weights
from fastmtl.weighting.PCGrad import RandomOrders

__all__ = ["GradVac"]


class GradVac(RandomOrders):
    """Gradient Vaccine: cosines below their moving average are raised to it, within each group of parameters.

    The formula is in :func:`fastmtl.ops.gradvac`.

    Source: Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
    Multilingual Models", ICLR 2021.
    """

    against_groups = "it has groups of its own, GradVac_group_type"
    hyper = {  # noqa: RUF012
        "GradVac_beta": Hyper(
            type=float, default=0.5, least=0.0, most=1.0, help="Decay of the moving average of the cosines."
        ),
        "GradVac_group_type": Hyper(
            type=int, default=0, choices=(0, 1, 2), help="One group of all (0), of each layer (1), of each tensor (2)."
        ),
    }

    rho: Tensor

    def init_param(self) -> None:
        """Create the average cosines, for as many groups as there are parameters at most."""
        count = len(list(self.get_share_params()))
        self.remember("rho", torch.zeros(max(count, 1), self.task_num, self.task_num, dtype=torch.float64), (1, 2))
        self._groups: dict[int, list[int]] = {}

    def groups(self, *, GradVac_group_type: int = 0, **hyper: object) -> list[int] | None:
        """Return the group of each shared parameter, None if there is one."""
        if GradVac_group_type == 0:
            return None
        if GradVac_group_type not in self._groups:
            self._groups[GradVac_group_type] = self._find_groups(GradVac_group_type)
        return self._groups[GradVac_group_type]

    def _find_groups(self, kind: int) -> list[int]:
        params = [param for param in self.get_share_params() if param.requires_grad]
        if kind == 2:
            return list(range(len(params)))
        owner = {id(param): id(module) for module in self.modules() for param in module._parameters.values()}
        groups: dict[int, int] = {}
        return [groups.setdefault(owner[id(param)], len(groups)) for param in params]

    def weigh(self, losses: Tensor, gram: Tensor, *, GradVac_beta: float = 0.5, **hyper: object) -> Weights:
        """Return the sums of the raised gradients' coefficients (T,), with groups (L, T)."""
        grams = gram if gram.dim() == 3 else gram[None]
        weights, rho = ops.gradvac(grams, self.draw_orders(grams[0]), self.rho[: len(grams)], GradVac_beta)
        self.rho[: len(grams)] = rho
        return Weights(shared=weights if gram.dim() == 3 else weights[0])
