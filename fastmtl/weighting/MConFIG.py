"""Conflict-free inverse gradients of moving averages: one task's gradient a step."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.engine.weights import Row
from fastmtl.support.dtypes import wide_dtype
from fastmtl.weighting.abstract_weighting import AbsWeighting, Rows, Weights
from fastmtl.weighting.row_state import RowState

__all__ = ["MConFIG"]


class MConFIG(AbsWeighting):
    """M-ConFIG, the momentum form of ConFIG: a step needs the gradient of one task, not of all.

    With Adam's beta1 b, ``m_t = b m_t + (1 - b) g_t`` for the task t of step k, which is the n_t-th of that task;
    ``c`` is the update of :class:`~fastmtl.weighting.ConFIG.ConFIG` for all ``m_s / (1 - b^n_s)``. Adam gets the
    gradient ``(M - b M') / (1 - b)``, ``M = (1 - b^k) c``, ``M'`` that of the step before: its first moment without
    bias is then ``c``, and its second moment that of these pseudo-gradients.

    Tasks take turns, in an order that is new in every round; with ``tasks_per_step`` a step has more of them. Until all
    have had their first step, those that had one are combined. Task-specific parameters follow the task's own gradient.
    The optimizer must be Adam or AdamW.

    Source: Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
    ICLR 2025.
    """

    needs = "rows"
    tasks_per_step = 1
    steers_adam = True
    allows_rep_grad = False

    mass: Tensor
    steps: Tensor

    def init_param(self) -> None:
        """Create the averages, the sums of their weights, Adam's first moment and the count of steps."""
        # A step of some tasks combines the averages of all.
        self.averages = RowState(self, "task_moments", self.task_num)
        self.moment = RowState(self, "adam_moment", 1)
        self.remember("mass", torch.zeros(self.task_num), task_dims=())
        self.remember("steps", torch.zeros(()))

    def weigh_rows(self, losses: Tensor, rows: Rows, **hyper: object) -> Weights:
        """Return the pseudo-gradient as the only row."""
        decay, wide = self.first_decay, wide_dtype(losses.device)
        averages, places = self.averages.rows, range(len(rows)) if self.active is None else self.active
        # Numbers from the host would be a copy that waits; these are filled in on the device.
        decays = [decay if task in places else 1.0 for task in range(len(averages))]
        keep = torch.stack([losses.new_full((), value, dtype=wide) for value in decays])
        of_all: Rows = [[None] * len(row) for row in averages]
        for place, row in zip(places, rows, strict=True):
            of_all[place] = row
        gram = self.whole(ops.ema_gram_(averages, of_all, keep, 1 - keep))
        self.mass.mul_(keep).add_(1 - keep)
        self.steps.add_(1)
        unbias = torch.where(self.mass > 0, 1 / self.mass.to(wide), 0.0)
        weights = ops.config(gram * unbias * unbias[:, None])
        moment = ops.combine(averages, weights * unbias * (1 - decay ** self.steps.to(wide)))
        pseudo = self._follow(cast(Row, moment), decay)
        return Weights(
            shared=weights.new_ones(1), rows=[pseudo], logged=torch.stack([weights[place] for place in places])
        )

    def _follow(self, moment: Row, decay: float) -> Row:
        """Return the gradient with which Adam's first moment becomes ``moment``, and remember that."""
        pseudo: Row = []
        for old, new in zip(self.moment.rows[0], moment, strict=True):
            assert old is not None
            assert new is not None
            pseudo.append(torch.lerp(old, new, 1 / (1 - decay)))
            old.copy_(new)
        return pseudo
