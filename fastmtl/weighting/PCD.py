"""Priority-constrained descent."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.errors import UsageError
from fastmtl.weighting.abstract_weighting import AbsWeighting, Hyper, Weights

__all__ = ["PCD", "descend_by_priority", "priority_weights"]


def priority_weights(gram: Tensor, tau: float | Tensor, primary: int = 0) -> Tensor:
    """Return the weights of the d closest to g_p under ``<g_j, d> >= tau_j |g_j|^2`` for all others; w_p is 1.

    Where no d satisfies all constraints they are dropped: w is zero but for w_p. G is (T, T) in float64; tau is one
    fraction of progress or T - 1 of them, ``primary`` is p.
    """
    size = len(gram)
    if size == 1:
        return torch.ones_like(gram[0])
    # Filled in on the device: numbers from the host would be a copy that waits.
    index = torch.arange(size - 1, device=gram.device)
    index = index + (index >= primary)
    rest = gram[index][:, index]
    square = rest.diagonal()
    # d = g_p + sum_j mu_j g_j; the multipliers mu solve the dual, a program over mu >= 0.
    linear = tau * square - gram[index, primary]
    multipliers = ops.nonneg_qp(rest, linear)
    length = square.clamp(min=0).sqrt()
    unit = torch.where(length > 0, linear.abs() / length, 0.0).max()
    feasible = (rest @ multipliers - linear >= -1e-6 * unit * length).all()
    multipliers = torch.where(feasible | multipliers.isnan().any(), multipliers, 0.0)
    return torch.ones_like(gram[0]).index_put((index,), multipliers)


def constrained_descent(gram: Tensor, scale: Tensor, tau: float | Tensor, primary: int = 0) -> Tensor:
    """Return the :func:`priority_weights` of gradients times (T,) factors, for an update as long as g_p."""
    normalised = gram * scale * scale[:, None]
    weights = priority_weights(normalised, tau, primary)
    length = (weights @ normalised @ weights).clamp(min=0)
    sizes = (weights * normalised.diagonal().clamp(min=0).sqrt()).sum()
    # Where the sum cancels, it has no direction, and the update is zero.
    lost = length <= 1e-14 * sizes * sizes
    square = gram[primary, primary].clamp(min=0)
    return scale * (weights * torch.where(lost, 0.0, (square / torch.where(lost, 1.0, length)).sqrt()))


def descend_by_priority(
    gram: Tensor,
    square_average: Tensor,
    steps: Tensor,
    *,
    tau: float | Tensor,
    beta: float,
    eps: float,
    primary: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return PCD's weights, all NaN if G is not finite, and its state after this step.

    The state is the (T,) moving average of ``|g_i|^2``, which starts at 0, and the number of steps in it.
    """
    steps = steps + 1
    square_average = beta * square_average + (1 - beta) * gram.diagonal().clamp(min=0)
    spread = square_average / (1 - beta ** steps.to(gram)) + eps
    # A gradient that has always been 0 has no scale without eps.
    scale = torch.where(spread == 0, 0.0, spread.rsqrt())
    return constrained_descent(gram, scale, tau, primary), square_average, steps


class PCD(AbsWeighting):
    """Priority-Constrained Descent: as close to the primary task's gradient as lets every other task make progress.

    With ``s_i = 1 / sqrt(v_i + eps)``, v_i a moving average of ``|g_i|^2`` without its bias, and ``n_i = s_i g_i``: the
    update is the d closest to n_p under ``<n_j, d> >= tau |n_j|^2`` for all other tasks j, as long as g_p. If no such
    d exists, it is g_p.

    Source: "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
    Optimization", TMLR 2026.
    """

    needs = "gram"
    allows_rep_grad = False
    hyper = {  # noqa: RUF012
        "PCD_tau": Hyper(
            type=float, default=0.02, least=0.0, most=1.0, help="Share of its own progress every other task gets."
        ),
        "PCD_beta": Hyper(
            type=float, default=0.999, least=0.0, below=1.0, help="Decay of the moving average of the squared norms."
        ),
        "PCD_eps": Hyper(type=float, default=1e-8, least=0.0, help="Added to that average."),
        "PCD_primary": Hyper(type=int, default=0, help="Index of the primary task."),
    }

    square_average: Tensor
    steps_seen: Tensor

    def init_param(self) -> None:
        """Create the moving average."""
        self.remember("square_average", torch.zeros(self.task_num, dtype=torch.float64))
        self.remember("steps_seen", torch.zeros(self.task_num))

    def start_epoch(self, *, PCD_primary: int = 0, **hyper: object) -> None:
        """Raise a UsageError for a primary task that is not there."""
        if not 0 <= PCD_primary < self.task_num:
            raise UsageError(f"PCD_primary must be from 0 to {self.task_num - 1}, got {PCD_primary}.")

    def weigh(
        self,
        losses: Tensor,
        gram: Tensor,
        *,
        PCD_tau: float = 0.02,
        PCD_beta: float = 0.999,
        PCD_eps: float = 1e-8,
        PCD_primary: int = 0,
        **hyper: object,
    ) -> Weights:
        """Return the constrained descent's weights."""
        # In a step of some tasks without the primary one, the first of them takes its place.
        tasks = list(range(self.task_num)) if self.active is None else self.active
        primary = tasks.index(PCD_primary) if PCD_primary in tasks else 0
        weights, average, steps = descend_by_priority(
            gram, self.square_average, self.steps_seen, tau=PCD_tau, beta=PCD_beta, eps=PCD_eps, primary=primary
        )
        self.square_average.copy_(average)
        self.steps_seen.copy_(steps)
        return Weights(shared=weights)
