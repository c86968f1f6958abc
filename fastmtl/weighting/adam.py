"""Adam for the few numbers a strategy learns by itself, with its state among what the strategy remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastmtl.weighting.base import AbsWeighting

__all__ = ["Adam"]

_DECAY = (0.9, 0.999)


class Adam:
    """A vector and the moments of its gradients, kept on the strategy's device.

    Args:
        owner: The strategy, which remembers ``<name>_value``, ``<name>_first``, ``<name>_second``, ``<name>_steps``.
        name: Prefix of those names.
        value: The vector to start from.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """

    def __init__(self, owner: AbsWeighting, name: str, value: Tensor) -> None:
        self._owner = owner
        self._name = name
        owner.remember(f"{name}_value", value.clone())
        owner.remember(f"{name}_first", torch.zeros_like(value))
        owner.remember(f"{name}_second", torch.zeros_like(value))
        owner.remember(f"{name}_steps", torch.zeros(()))

    def _kept(self, what: str) -> Tensor:
        found: Tensor = getattr(self._owner, f"{self._name}_{what}")
        return found

    @property
    def value(self) -> Tensor:
        """Return the vector."""
        return self._kept("value")

    @torch.no_grad()
    def step(self, grad: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        """Move the vector against a gradient, to which ``weight_decay`` times the vector is added."""
        value, first, second, steps = (self._kept(what) for what in ("value", "first", "second", "steps"))
        grad = grad + weight_decay * value
        steps.add_(1)
        first.lerp_(grad, 1 - _DECAY[0])
        second.lerp_(grad * grad, 1 - _DECAY[1])
        size = (second / (1 - _DECAY[1] ** steps)).sqrt() + 1e-8
        value.sub_(lr * first / (1 - _DECAY[0] ** steps) / size)
