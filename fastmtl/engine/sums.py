"""The engine of strategies that read losses only: one backward pass of the weighted sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmtl.engine.buffers import keeping_buffers
from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch, StepContext, step_losses
from fastmtl.engine.jacobian import detached
from fastmtl.engine.methods.base import forward, mean_of_forwards
from fastmtl.engine.pullback import Sum
from fastmtl.engine.regions import Regions
from fastmtl.engine.weights import Weights

__all__ = ["LossEngine", "LossSum"]


class LossSum:
    """The losses of a step, whose weighted sum is still to be differentiated.

    Batches are accumulated so that no more than one batch's graph is kept. Where the weights depend on the mean losses,
    a forward pass of all batches has come first.

    Attributes:
        losses: (T,) losses of the step, before the gradients are written of what the weights depend on.
        shown: The same.
        preds: Predictions by task of each batch.
    """

    def __init__(self, ctx: StepContext, regions: Regions, comm: Comm, reads_losses: bool) -> None:
        self._ctx = ctx
        self._regions = regions
        self._comm = comm
        self._losses: list[Tensor] = []
        self.preds: list[Mapping[str, object]] = []
        self._first: Sum | None = None
        if len(ctx.batches) > 1 and reads_losses:
            with torch.no_grad(), keeping_buffers(regions.problem.model):
                self.losses = self._of_step(mean_of_forwards(regions, ctx.batches, comm))
        else:
            self._first = self._forward(ctx.batches[0])
            self.losses = self._losses[0]
        self.shown = self.losses

    def _forward(self, batch: Batch) -> Sum:
        self._comm.unshard()
        attached, preds = forward(self._regions, batch)
        losses, preds = detached(attached, preds)
        self._losses.append(self._comm.mean(losses, batch.share))
        self.preds.append(preds)
        return Sum(attached, batch)

    def write_grads(self, weights: Weights) -> None:
        """Run the backward passes, and the forward passes that have not been."""
        for batch in self._ctx.batches:
            pending, self._first = self._first or self._forward(batch), None
            pending.backward(weights.shared)
            del pending
        self._comm.reduce(self._ctx.tasks)
        self.losses = self._of_step(torch.stack(self._losses))

    def _of_step(self, losses: Tensor) -> Tensor:
        return step_losses(self._regions.problem, self._ctx, losses, self._comm)


class LossEngine:
    """One backward pass of the weighted losses, once the weights are known.

    Args:
        regions: The network's functions, compiled or not.
        comm: The other processes.
        reads_losses: Whether the weights depend on the losses.
    """

    keeps_grads = False
    possible = True

    def __init__(self, regions: Regions, comm: Comm, reads_losses: bool) -> None:
        self.regions = regions
        self.comm = comm
        self.reads_losses = reads_losses

    def differentiate(self, ctx: StepContext, known: Weights | None) -> LossSum:
        """Run the forward pass."""
        return LossSum(ctx, self.regions, self.comm, self.reads_losses)
