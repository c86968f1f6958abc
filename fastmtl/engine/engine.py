"""The engines that differentiate the losses of a step; this one for strategies that balance the tasks' gradients."""

from __future__ import annotations

from typing import Protocol

import torch

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import StepContext
from fastmtl.engine.jacobian import BatchGradients, Differentiated, Jacobian
from fastmtl.engine.methods.base import Method
from fastmtl.engine.regions import Regions
from fastmtl.engine.weights import Weights

__all__ = ["Engine", "GradientEngine"]


class Engine(Protocol):
    """Differentiates the losses of a step.

    Attributes:
        regions: The network's functions, compiled or not.
        keeps_grads: Whether ``.grad`` must be there, as zeros, before a step.
    """

    regions: Regions
    keeps_grads: bool

    @property
    def possible(self) -> bool:
        """Return False once it has turned out that this engine does what a plainer one does."""

    def differentiate(self, ctx: StepContext, known: Weights | None) -> Differentiated:
        """Run the forward passes of a step, and what can be differentiated before the weights are decided.

        Args:
            ctx: The step.
            known: The weights, if they are known beforehand.
        """


class GradientEngine:
    """One VJP for every task, or one for all where the weights are known beforehand.

    Args:
        method: How the gradients of a batch are computed.
    """

    keeps_grads = False

    def __init__(self, method: Method) -> None:
        self.method = method
        self.problem = method.problem
        self.comm: Comm = method.comm
        self.regions = method.regions

    @property
    def possible(self) -> bool:
        """Return False once the method does what a plainer one does."""
        return self.method.possible

    def differentiate(self, ctx: StepContext, known: Weights | None) -> Jacobian:
        """Return the Jacobian of a step."""
        batches: list[BatchGradients] = []
        losses, preds = [], []
        for batch in ctx.batches:
            self.comm.unshard()
            found = self.method(batch) if known is None else self.method.combined(batch, known)
            losses.append(self.comm.mean(found.losses, batch.share))
            preds.append(found.preds)
            if not batches or batch.complete:
                batches.append(found)
            else:
                batches[0].absorb(found)
        return Jacobian(batches, torch.stack(losses), preds, ctx, self.problem, self.comm)
