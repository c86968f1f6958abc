"""The engines: for strategies that balance gradients, that read losses only, or that are written for LibMTL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch, StepContext, step_losses
from fastmtl.engine.cut import Structure
from fastmtl.engine.jacobian import BatchGradients, Differentiated, Jacobian, detached
from fastmtl.engine.losses import Problem
from fastmtl.engine.methods.base import Method, forward, mean_of_forwards
from fastmtl.engine.model import preserving_buffers
from fastmtl.engine.pullback import Sum
from fastmtl.engine.regions import Regions
from fastmtl.engine.weights import Weights
from fastmtl.errors import UsageError
from fastmtl.support.kinds import Settings, State

__all__ = ["Engine", "ForeignEngine", "ForeignLosses", "GradientEngine", "LossEngine", "LossSum"]


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
        """Return False once this engine is known to do the same as a simpler one."""

    def differentiate(self, ctx: StepContext, known: Weights | None) -> Differentiated:
        """Run the forward passes of a step, and the VJPs that do not need the weights.

        Args:
            ctx: The step.
            known: The weights, if they are decided beforehand.
        """

    def state_dict(self) -> State:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: Settings) -> None:
        """Go on where `state_dict` was taken."""
        return None


class GradientEngine(Engine):
    """One VJP per task, or a single one where the weights are known beforehand; a `Method` handles each batch."""

    keeps_grads = False

    def __init__(self, method: Method) -> None:
        self.method = method
        self.problem = method.problem
        self.comm: Comm = method.comm
        self.regions = method.regions

    @property
    def possible(self) -> bool:
        """Return False once the method is known to do the same as a simpler one."""
        return self.method.possible

    def state_dict(self) -> State:
        """Return what the method of a resumed run needs."""
        return self.method.state_dict()

    def load_state_dict(self, state: Settings) -> None:
        """Go on where `state_dict` was taken."""
        self.method.load_state_dict(state)

    def differentiate(self, ctx: StepContext, known: Weights | None) -> Jacobian:
        """Return the Jacobian of a step."""
        batches: list[BatchGradients] = []
        losses, preds = [], []
        for batch in ctx.batches:
            self.comm.unshard()
            batch_grads = self.method(batch) if known is None else self.method.combined(batch, known)
            losses.append(self.comm.mean(batch_grads.losses, batch.share))
            preds.append(batch_grads.preds)
            # Samples of the strategy stay separate, accumulated batches are added.
            if batches and not batch.final:
                batches[0].absorb(batch_grads)
                continue
            batches.append(batch_grads)
            if len(batches) > 1:
                batches[0].pullback.join(batch_grads.pullback)
        return Jacobian(batches, _stacked(losses), preds, ctx, self.problem, self.comm)


def _stacked(losses: Sequence[Tensor]) -> Tensor:
    """Return the losses (T,) of n batches as (n, T), a view of those of a single one."""
    return torch.stack(list(losses)) if len(losses) > 1 else losses[0].unsqueeze(0)


class LossSum(Differentiated):
    """The losses of a step, whose weighted sum is yet to be differentiated.

    One batch's graph at most is alive at a time. Where the weights depend on the mean losses of accumulated batches, a
    forward pass of all batches comes first.

    Attributes:
        losses: (T,) losses of the step; before :meth:`write_grads` those the weights depend on.
        strategy_losses: The losses that the strategy reads: ``losses`` before :meth:`write_grads`.
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
            with preserving_buffers(regions.problem.model):
                self.losses = self._of_step(mean_of_forwards(regions, ctx.batches, comm))
        else:
            self._first = self._forward(ctx.batches[0])
            self.losses = self._losses[0]
        self.strategy_losses = self.losses

    def _forward(self, batch: Batch) -> Sum:
        self._comm.unshard()
        attached, preds = forward(self._regions, batch)
        losses, preds = detached(attached, preds)
        self._losses.append(self._comm.mean(losses, batch.share))
        self.preds.append(preds)
        return Sum(attached, batch)

    def write_grads(self, weights: Weights) -> None:
        """Run the backward passes, and the forward passes that are still missing."""
        for batch in self._ctx.batches:
            pending, self._first = self._first or self._forward(batch), None
            pending.backward(weights.shared)
            del pending
        self._comm.all_reduce_grads(self._ctx.tasks)
        self.losses = self._of_step(_stacked(self._losses))

    def _of_step(self, losses: Tensor) -> Tensor:
        return step_losses(self._regions.problem, self._ctx, losses, self._comm)


class LossEngine(Engine):
    """One backward pass of the weighted losses, once the weights are known."""

    keeps_grads = False
    possible = True

    def __init__(self, structure: Structure, regions: Regions, comm: Comm, reads_losses: bool) -> None:
        self.structure = structure
        self.regions = regions
        self.comm = comm
        self.reads_losses = reads_losses

    def differentiate(self, ctx: StepContext, known: Weights | None) -> LossSum:
        """Run the forward pass."""
        self.comm.unshard()
        self.structure.learn_decoders(ctx.batches[0])
        return LossSum(ctx, self.regions, self.comm, self.reads_losses)


class ForeignLosses(Differentiated):
    """The losses of a step whose strategy fills ``.grad`` itself.

    Attributes:
        attached: (T,) losses with their graph.
        losses: The same, detached.
        preds: Predictions by task, in a list of one.
    """

    def __init__(self, attached: Tensor, preds: Mapping[str, object], problem: Problem) -> None:
        self.attached = attached
        self.losses = attached.detach()
        self.preds = [preds]
        self._problem = problem

    def write_grads(self, weights: Weights) -> None:
        """Check that the strategy has written the gradients.

        Raises:
            UsageError: With ``rep_grad`` no shared parameter has a gradient.
        """
        problem = self._problem
        if problem.model.rep_grad and all(param.grad is None for param in problem.shared_params):
            raise UsageError(
                f"{problem.model.strategy_name} leaves the shared parameters without gradients if rep_grad is True: "
                "its backward must propagate the gradient of the representation, as _backward_new_grads does."
            )


class ForeignEngine(Engine):
    """One forward pass; the strategy's ``backward`` does the rest."""

    keeps_grads = True
    possible = True

    def __init__(self, regions: Regions) -> None:
        self.regions = regions

    def differentiate(self, ctx: StepContext, known: Weights | None) -> ForeignLosses:
        """Run the forward pass."""
        losses, preds = forward(self.regions, ctx.batches[0])
        return ForeignLosses(torch.stack(list(losses)), preds, self.regions.problem)
