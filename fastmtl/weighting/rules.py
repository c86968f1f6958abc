"""Formulas that several strategies, or one and an aggregator or scalarizer of TorchJD's names, have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.weighting.simplex import project_simplex

__all__ = ["descent_rates", "directed_weights", "even_fall", "even_fall_slope", "raised", "random_weights", "stepped"]


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
    """Return SDMGrad's weights: projected gradient descent with momentum from ``weights``.

    Args:
        weights: (T,) on the simplex.
        cross: (T, T) products J_1 J_2^T of two batches' gradients, which are brought to mean length one.
        preference: (T,) weights of the direction that is preferred.
        lamda: How strongly.
        steps: Number of steps.
        rate: Learning rate.
        momentum: Share of the last step.
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
    """Return DWA's weights: T times the softmax of the losses' ratios over two epochs, divided by the temperature."""
    return len(newer) * torch.softmax(newer / older / temperature, dim=-1)


def even_fall(logits: Tensor, excess: Tensor) -> Tensor:
    """Return FAMO's weights, ``z_t / D_t`` divided by their sum, ``z = softmax(logits)`` and D the excess losses."""
    share = torch.softmax(logits, dim=-1) / excess
    return share / share.sum()


def even_fall_slope(logits: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return the gradient that moves FAMO's logits, from the excess losses of one batch before and after the update."""
    fall = before.log() - after.log()
    share = torch.softmax(logits, dim=-1)
    return share * (fall - share @ fall)
