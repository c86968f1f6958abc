"""The engine of strategies written for LibMTL, which run backward passes of their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmtl.engine.context import StepContext
from fastmtl.engine.losses import Problem
from fastmtl.engine.methods.base import forward
from fastmtl.engine.regions import Regions
from fastmtl.engine.weights import Weights
from fastmtl.errors import UsageError

__all__ = ["ForeignEngine", "ForeignLosses"]


class ForeignLosses:
    """The losses of a step, of which the strategy fills ``.grad`` by itself.

    Attributes:
        attached: (T,) losses with their graph.
        losses: The same without.
        preds: Predictions by task, in a list of one.
    """

    def __init__(self, attached: Tensor, preds: Mapping[str, object], problem: Problem) -> None:
        self.attached = attached
        self.losses = attached.detach()
        self.preds = [preds]
        self._problem = problem

    def write_grads(self, weights: Weights) -> None:
        """Check that the strategy has written them.

        Raises:
            UsageError: With ``rep_grad`` no shared parameter has got a gradient.
        """
        problem = self._problem
        if problem.model.rep_grad and all(param.grad is None for param in problem.shared_params):
            raise UsageError(
                f"{problem.model.strategy_name} leaves the shared parameters without gradients if rep_grad is True: "
                "its backward must send those of the representation on, as _backward_new_grads does."
            )


class ForeignEngine:
    """One forward pass; the strategy's ``backward`` does the rest.

    Args:
        regions: The network's functions, compiled or not.
    """

    keeps_grads = True
    possible = True

    def __init__(self, regions: Regions) -> None:
        self.regions = regions

    def differentiate(self, ctx: StepContext, known: Weights | None) -> ForeignLosses:
        """Run the forward pass."""
        losses, preds = forward(self.regions, ctx.batches[0])
        return ForeignLosses(torch.stack(list(losses)), preds, self.regions.problem)
