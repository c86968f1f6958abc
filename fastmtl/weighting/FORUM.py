"""First-order multi-gradient bilevel optimization."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.engine.gradients import zero_unless
from fastmtl.engine.lookahead import LookAhead
from fastmtl.weighting.abstract_weighting import Hyper, Weights
from fastmtl.weighting.AutoLambda import INNER_LR, OUTER_LR, Bilevel

__all__ = ["FORUM", "forum_weights"]

_HALVINGS = 60


def forum_weights(cosines: Tensor, products: Tensor, square: Tensor, phi: float) -> Tensor:
    """Return the l on the simplex that minimises ``|sum_t l_t u_t + n q|^2 - phi n |q|^2``, ``n = max(0, s(l))``.

    ``s(l) = phi - <sum_t l_t u_t, q> / |q|^2`` is what n must at least be for the update to descend on q by
    ``phi |q|^2``. The objective is convex, with one quadratic where s > 0 and one where s < 0: the minimiser of one of
    them is on its own side, or the solution lies on s = 0. Accurate to about 1e-6. ``cosines`` are the (T, T) products
    of the unit vectors u_t, ``products`` the (T,) ``<u_t, q>``, ``square`` is ``|q|^2``.
    """
    share = products / square.where(square > 0, 1.0)
    free = ops.min_norm(cosines)
    slack = phi - share
    # On s > 0, with n = s: the part of q's own direction drops out of the square, and a linear term is left.
    identity = torch.eye(len(cosines), dtype=cosines.dtype, device=cosines.device)
    across = 2 * (cosines - products * share[:, None]) + 1e-9 * identity
    linear = phi * products
    linear = linear - linear.min()
    low, high = linear.new_zeros(()), across.diagonal().max() + linear.max()
    for _ in range(_HALVINGS):
        level = (low + high) / 2
        full = ops.nonneg_qp(across, level - linear).sum() >= 1
        low, high = torch.where(full, low, level), torch.where(full, level, high)
    bound = _on_simplex(ops.nonneg_qp(across, high - linear))
    # On s = 0: l is the solution for the right side 1 - m slack at the m where its slack vanishes.
    damped = cosines + 1e-9 * identity
    low, high = slack.new_zeros(()), 1 / slack.where(slack > 0, torch.inf).min()
    for _ in range(_HALVINGS):
        level = (low + high) / 2
        above = slack @ ops.nonneg_qp(damped, 1 - level * slack) >= 0
        low, high = torch.where(above, level, low), torch.where(above, high, level)
    edge = _on_simplex(ops.nonneg_qp(damped, 1 - low * slack))
    return torch.where(slack @ free <= 0, free, torch.where(slack @ bound >= 0, bound, edge))


def _on_simplex(weights: Tensor) -> Tensor:
    total = weights.sum()
    return weights / total.where(total > 0, 1.0)


class FORUM(Bilevel):
    """FORUM: all tasks descend on one half of a batch, while training on the other half stays near its optimum.

    With ``f(w, theta) = sum_t w_t L_t`` on the inner half and theta' some gradient steps on f ahead,
    ``q(w, theta) = f(w, theta) - f(w, theta')`` measures how far theta is from solving the lower level. The update of
    logits and parameters is ``sum_t l_t u_t + n grad q`` with u_t the unit gradients of the losses on the outer half,
    l a moving average of the minimisers of :func:`forum_weights`, and n as large as makes q fall by
    ``FORUM_phi |grad q|^2``.

    Source: Ye, Lin and Zhang, "A First-Order Multi-Gradient Algorithm for Multi-Objective Bi-Level Optimization",
    ECAI 2024.
    """

    hyper = {  # noqa: RUF012
        "outer_lr": OUTER_LR,
        "inner_lr": INNER_LR,
        "inner_step": Hyper(type=int, default=5, least=1, help="Steps the strategy looks ahead."),
        "FORUM_phi": Hyper(
            type=float, default=0.1, least=0.0, help="Share of the lower level's descent that is insisted on."
        ),
    }

    multipliers: Tensor

    def init_param(self) -> None:
        """Create the logits and the moving average of l."""
        super().init_param()
        self.remember("multipliers", torch.zeros(self.task_num, dtype=torch.float64))

    def look_ahead(
        self,
        ahead: LookAhead,
        *,
        outer_lr: float = 1e-3,
        inner_lr: float = 0.1,
        inner_step: int = 5,
        FORUM_phi: float = 0.1,
        **hyper: object,
    ) -> Weights:
        """Return weights of the outer half's gradients and of the inner half's."""
        size, weights = self.task_num, self.task_weights()
        here, inner = ahead.gradient(ahead.inner, weights)
        with ahead.moved():
            alive = torch.ones_like(weights[0])
            for _ in range(inner_step):
                losses, step = ahead.gradient(ahead.inner, weights)
                # Too large an inner_lr diverges: the look ahead ends there.
                alive = torch.where(weights @ losses <= 1e5, alive, 0.0)
                ahead.move([None if part is None else zero_unless(alive > 0, part) for part in step], -inner_lr)
            there = ahead.losses(ahead.inner)
        gap = self.through_softmax((here - there).double())
        _, outer = ahead.rows(ahead.outer)
        gram = ops.gram([*outer, inner])
        square = gram[size, size] + gap @ gap
        length = gram.diagonal()[:size].clamp(min=0).sqrt()
        inverse = torch.where(length > 0, 1 / length, 0.0)
        products = inverse * gram[:size, size]
        minimiser = forum_weights(gram[:size, :size] * inverse * inverse[:, None], products, square, FORUM_phi)
        self.multipliers.lerp_(minimiser, 1 / (self.epoch + 1) ** 0.75)
        slack = FORUM_phi - products / square.where(square > 0, 1.0)
        pull = (self.multipliers @ slack).clamp(min=0)
        self.logits.step((pull * gap).to(weights.dtype), lr=outer_lr)
        update = torch.cat([self.multipliers * inverse, pull[None]])
        return Weights(shared=update, rows=[*outer, inner], logged=weights)
