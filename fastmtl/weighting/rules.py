"""Formulas that several strategies use, or a strategy and an aggregator or scalarizer with TorchJD's name."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.weighting.abstract_weighting import AbsWeighting

__all__ = [
    "Adam",
    "counted",
    "descent_rates",
    "directed_weights",
    "geometric_mean",
    "project_simplex",
    "raised",
    "random_weights",
    "stepped",
]

_DECAY = (0.9, 0.999)


def counted(losses: Tensor) -> Tensor:
    """Return which losses take part in a step of a rule for positive losses; the gradient of one of 0 is 0 anyway.

    Those that do not are 0, negative, or too small for a reciprocal, which many devices round to 0.
    """
    return losses >= torch.finfo(losses.dtype).tiny


def geometric_mean(losses: Tensor, known: Tensor) -> Tensor:
    """Return the geometric mean of the losses that are ``known``, 1 if none is."""
    # The mean of logarithms: the product of many small losses would underflow.
    return (torch.where(known, losses, 1.0).log().sum() / known.sum().clamp(min=1)).exp()


def project_simplex(point: Tensor) -> Tensor:
    """Return the nearest (T,) vector that is nonnegative and sums to one.

    Source: Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", ICML 2008.
    """
    # The projection does not change with a shift; without one, the 1 is lost beside entries of 1e8.
    point = point - point.max()
    falling = point.sort(descending=True).values
    position = torch.arange(1, len(point) + 1, dtype=point.dtype, device=point.device)
    thresholds = (falling.cumsum(0) - 1) / position
    # The threshold at the last entry that stays above its own.
    kept = (falling > thresholds).sum().clamp(min=1)
    return (point - thresholds.gather(0, (kept - 1).reshape(1))).clamp(min=0)


def random_weights(like: Tensor) -> Tensor:
    """Return the softmax of (T,) standard normal numbers, of the dtype and device of ``like``: RLW."""
    return torch.softmax(torch.randn_like(like), dim=-1)


def raised(weights: Tensor, risks: Tensor, step: float) -> Tensor:
    """Return positive weights after an exponentiated gradient step, summing to one."""
    return torch.softmax(weights.log() + step * risks, dim=-1)


def stepped(weights: Tensor, cross: Tensor, gamma: float, rho: float) -> Tensor:
    """Return MoDo's weights after a projected gradient step, ``project(w - gamma (J_1 J_2^T w + rho w))``."""
    return project_simplex(weights - gamma * (cross @ weights + rho * weights))


def directed_weights(
    weights: Tensor,
    cross: Tensor,
    preference: Tensor,
    *,
    lamda: float,
    steps: int,
    rate: float = 5.0,
    momentum: float = 0.5,
) -> Tensor:
    """Return SDMGrad's weights: projected gradient descent with momentum from (T,) ``weights`` on the simplex.

    ``cross`` has the products J_1 J_2^T of two batches' gradients, which are brought to mean length one; ``lamda`` is
    how strongly the direction of weights ``preference`` is preferred.
    """
    scale = cross.diagonal().clamp(min=0).sqrt().mean()
    cross = cross / (scale**2 + 1e-8)
    pull = lamda * (cross @ preference)
    velocity = torch.zeros_like(weights)
    for _ in range(steps):
        velocity = momentum * velocity + cross @ weights + pull
        weights = project_simplex(weights - rate * velocity)
    return weights


def descent_rates(newer: Tensor, older: Tensor, temperature: float) -> Tensor:
    """Return DWA's weights: T times the softmax of the losses' ratios over two epochs, divided by the temperature.

    A task whose older loss is 0 has no ratio: its weight is 1, and the others' weights are those without it.
    """
    known = counted(older) & newer.isfinite()
    ratio = (newer / older / temperature).clamp(max=torch.finfo(older.dtype).max)
    weights = known.sum() * torch.softmax(torch.where(known, ratio, -torch.inf), dim=-1)
    return torch.where(known, weights, 1.0)


class Adam:
    """A vector that a strategy learns with Adam, in the buffer ``<name>_value``.

    Its moments are in ``<name>_first`` and ``<name>_second``, the number of steps in ``<name>_steps``.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """

    def __init__(self, owner: AbsWeighting, name: str, value: Tensor) -> None:
        self._owner = owner
        self._name = name
        owner.remember(f"{name}_value", value.clone())
        owner.remember(f"{name}_first", torch.zeros_like(value))
        owner.remember(f"{name}_second", torch.zeros_like(value))
        owner.remember(f"{name}_steps", torch.zeros(()))

    @property
    def value(self) -> Tensor:
        """Return the vector."""
        return getattr(self._owner, f"{self._name}_value")

    @torch.no_grad()
    def step(self, grad: Tensor, lr: float) -> None:
        """Move the vector against a gradient."""
        first, second, steps = (getattr(self._owner, f"{self._name}_{part}") for part in ("first", "second", "steps"))
        steps.add_(1)
        first.lerp_(grad, 1 - _DECAY[0])
        second.lerp_(grad * grad, 1 - _DECAY[1])
        size = (second / (1 - _DECAY[1] ** steps)).sqrt() + 1e-8
        self.value.sub_(lr * first / (1 - _DECAY[0] ** steps) / size)
