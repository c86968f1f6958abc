"""Pullbacks that compute the gradients of the shared parameters by one more VJP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch
from fastmtl.engine.jacobian import HasRows, Pullback
from fastmtl.engine.model import Tasks
from fastmtl.engine.weights import Row, Rows, Weights
from fastmtl.support.profiling import part

__all__ = ["Representations", "Sum", "weighted"]


def weighted(weights: Tensor, cotangents: Rows) -> Row:
    """Return ``sum_t w_t cotangents_t``, tensor by tensor."""
    with part("combine"):
        return cast(Row, ops.combine(cotangents, weights))


class Representations(Pullback):
    """The rows are gradients of the representations; one VJP of their weighted sum gives those of the parameters.

    Args:
        attached: T representations with their graph, or one that the tasks share.
        grads: T gradients of them.
    """

    def __init__(self, attached: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.attached = attached
        self.grads = grads
        self.others: list[Representations] = []

    @property
    def reps(self) -> list[Tensor]:
        """Return T detached representations, T times the same tensor where the tasks share it."""
        reps = [rep.detach() for rep in self.attached]
        return reps if len(reps) == len(self.grads) else reps * len(self.grads)

    def collect(self, rows: Rows, comm: Comm, final: bool) -> Rows:
        """Return the sums of the rows over the processes."""
        return comm.collect_reps(rows)

    def gram(self, rows: Rows, groups: Sequence[int] | None, comm: Comm, shares: Tensor | None) -> Tensor:
        """Return the Gram matrix; each process has whole rows."""
        return ops.gram(rows, groups)

    def absorb(self, other: Pullback) -> None:
        """Keep the other batch's graph until the weights are known."""
        assert isinstance(other, Representations)
        self.others.append(other)

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Run the VJP of the weighted gradients of the representations."""
        if weights.reps is not None:
            self._backward(weights.reps)
        else:
            for batch in (self, *self.others):
                batch._backward([w.to(grad.dtype) * grad for w, grad in zip(weights.shared, batch.grads, strict=True)])
        comm.all_reduce_grads(tasks)

    def _backward(self, grads: Sequence[Tensor]) -> None:
        """Backpropagate T gradients of the representations, or their sum where the tasks share one."""
        fits = len(grads) == len(self.attached)
        with part("VJPs"):
            torch.autograd.backward(self.attached, list(grads) if fits else [torch.stack(list(grads)).sum(0)])


class Sum(Pullback):
    """The T losses are yet to be differentiated: one backward pass of their weighted sum, to all parameters."""

    def __init__(self, losses: Sequence[Tensor], batch: Batch) -> None:
        self.losses = losses
        self.batch = batch

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Run the backward pass."""
        self.backward(weights.shared)
        comm.all_reduce_grads(tasks)

    def backward(self, weights: Tensor) -> None:
        """Run the backward pass in this process, without losses that depend on no parameter."""
        seeds = self.batch.seeds(self.losses, weights)
        pairs = [(loss, seed) for loss, seed in zip(self.losses, seeds, strict=True) if loss.requires_grad]
        if pairs:
            with part("VJPs"):
                torch.autograd.backward([loss for loss, _ in pairs], [seed for _, seed in pairs])
