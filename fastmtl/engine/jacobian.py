"""The gradients of all tasks in one step, from the Gram matrix to ``.grad``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import StepContext, step_losses
from fastmtl.engine.gradients import TaskGradients, set_grads, summed
from fastmtl.engine.losses import Problem
from fastmtl.engine.model import Tasks
from fastmtl.engine.trees import map_tree
from fastmtl.engine.weights import Rows, Weights
from fastmtl.support.profiling import part

__all__ = ["BatchGradients", "Combine", "Differentiated", "HasRows", "Jacobian", "Known", "Pullback", "detached"]


class Differentiated(Protocol):
    """Losses of a step whose gradients wait for weights: what an engine returns.

    Attributes:
        losses: (T,) losses of the step; of accumulated batches known in full only after :meth:`write_grads`.
        preds: Predictions by task, of the last sample or of each accumulated batch; likewise.
    """

    losses: Tensor
    preds: list[Mapping[str, object]]

    def write_grads(self, weights: Weights) -> None:
        """Fill all ``.grad`` of the network."""


class HasRows(Protocol):
    """What has collected rows, or collects them when it is asked for them."""

    @property
    def rows(self) -> Rows:
        """Return the rows of all processes, or this one's pieces of them."""


class Pullback:
    """What the rows of a batch are, and how the weights pull them back to the shared parameters.

    Rows are gradients, or stand for them in the Gram matrix; what has that matrix without rows overrides :meth:`gram`.
    :meth:`write` is what every kind has of its own.
    """

    def collect(self, rows: Rows, comm: Comm, final: bool) -> Rows:
        """Return the rows of all processes, or this one's pieces of them."""
        return comm.collect(rows, final)

    def gram(self, rows: Rows, groups: Sequence[int] | None, comm: Comm, shares: Tensor | None) -> Tensor:
        """Return the Gram matrix of collected rows; (L, T, T) with L groups of parameters."""
        return comm.gram(rows, groups, shares)

    def absorb(self, other: Pullback) -> None:
        """Take in another batch, which together with this one makes one step; its rows are added to this one's."""
        raise NotImplementedError

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Fill ``.grad`` of the shared parameters, and sum that of all others over the processes."""
        raise NotImplementedError


class Combine(Pullback):
    """The rows are gradients of the shared parameters, and nothing else is needed of a batch."""

    def absorb(self, other: Pullback) -> None:
        """Have nothing to take in beside the rows."""

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Combine them."""
        comm.write_shared(source.rows if weights.rows is None else weights.rows, weights.shared, weights.groups, tasks)


class Known(Pullback):
    """The weights were known beforehand: the only row is the update."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = params

    def collect(self, rows: Rows, comm: Comm, final: bool) -> Rows:
        """Return the row as it is."""
        return rows

    def absorb(self, other: Pullback) -> None:
        """Have nothing to take in beside the row."""

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Write the update."""
        set_grads(self.params, source.rows[0])
        comm.all_reduce_grads(tasks)


@dataclass(slots=True)
class BatchGradients:
    """One forward pass and what came of it.

    Attributes:
        losses: (T,) detached.
        preds: Predictions by task, detached: whoever keeps them keeps no activations.
        rows: T gradients, each a list over tensors.
        task_grads: The gradients of the task-specific parameters.
        pullback: How weights become gradients of the shared parameters.
    """

    losses: Tensor
    preds: Mapping[str, object]
    rows: Rows
    task_grads: TaskGradients
    pullback: Pullback

    def absorb(self, other: BatchGradients) -> None:
        """Take in the gradients of another batch, which together with this one makes one step."""
        self.rows = summed(self.rows, other.rows)
        self.task_grads.absorb(other.task_grads)
        self.pullback.absorb(other.pullback)


def detached(losses: Tensor | Sequence[Tensor], preds: Mapping[str, object]) -> tuple[Tensor, Mapping[str, object]]:
    """Return the losses (T,) and the predictions without their graph."""
    if not isinstance(losses, Tensor):
        losses = torch.stack([loss.detach() for loss in losses])
    return losses, map_tree(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, preds)


class Jacobian:
    """The gradients of T losses: T rows over the shared parameters, and those of each task's own.

    Args:
        batches: Of each sample of the strategy; one where batches were accumulated.
        losses: (n, T) losses of all n batches.
        preds: Predictions of all batches.
        ctx: The step.
        problem: The model and its losses.
        comm: The other processes.

    Attributes:
        losses: (T,), their mean over the batches.
        shown: What the strategy is shown of them: (T,), or (samples, T).
        preds: Predictions by task, of the last sample or of each accumulated batch.
    """

    def __init__(
        self,
        batches: Sequence[BatchGradients],
        losses: Tensor,
        preds: list[Mapping[str, object]],
        ctx: StepContext,
        problem: Problem,
        comm: Comm,
    ) -> None:
        several = len(batches) > 1
        self.losses = step_losses(problem, ctx, losses, comm)
        self.shown = losses if several else self.losses
        self.preds = preds[-1:] if several else preds
        self.pullback = batches[-1].pullback
        self._batches = batches
        self._ctx = ctx
        self._known = isinstance(self.pullback, Known)
        self._comm = comm

    @cached_property
    def rows(self) -> Rows:
        """Return the rows of all processes, or this one's pieces of them; the first call may wait for messages."""
        rows = [row for batch in self._batches for row in batch.rows]
        return self.pullback.collect(rows, self._comm, self._ctx.batches[0].final) if rows else rows

    def gram(self, groups: Sequence[int] | None = None) -> Tensor:
        """Return the Gram matrix (R, R) of the R rows; (L, R, R) with the group, 0 .. L-1, of each shared parameter."""
        with part("gram"):
            gram = self.pullback.gram(self.rows, groups, self._comm, self._ctx.row_shares)
            return self._ctx.scaling.gram(gram)

    def unscaled_rows(self) -> Rows:
        """Return the rows without the loss scale of float16."""
        return self._ctx.scaling.rows(self.rows)

    def mean_gram(self, gram: Tensor) -> Tensor:
        """Return the (T, T) matrix of what :meth:`gram` returned: the groups' sum, or the mean of the samples' own."""
        if gram.dim() == 3:
            return gram.sum(0)
        size = len(self.losses)
        return torch.stack([gram[a : a + size, a : a + size] for a in range(0, len(gram), size)]).mean(0)

    def write_grads(self, weights: Weights) -> None:
        """Fill ``.grad``: of the shared parameters with the weighted rows, of the others with their sum.

        Those of the others come first: writing the shared ones also sums them over the processes.
        """
        heads = [None] * len(self._batches) if weights.heads is None else weights.heads.chunk(len(self._batches))
        with part("combine"):
            for batch, head_weights in zip(self._batches, heads, strict=True):
                batch.task_grads.write(head_weights)
        # The norm follows from the Gram matrix; with weights known beforehand there is none.
        if weights.max_norm is not None and weights.gram is not None:
            weights = _capped(weights, weights.gram, weights.max_norm)
        if weights.rows is not None:
            # They were shown, or made, without the loss scale that all other gradients carry.
            weights = replace(weights, shared=self._ctx.scaling.up(weights.shared))
        self.pullback.write(weights, self, self._comm, self._ctx.tasks)
        if weights.max_norm is not None and self._known:
            self._comm.clip_grad_norm(self._ctx.scaling.limit(weights.max_norm), shared_only=True)


def _capped(weights: Weights, gram: Tensor, max_norm: float) -> Weights:
    """Return weights with the norm of ``sum_t w_t g_t`` brought down to ``max_norm``."""
    norm = (weights.shared @ gram @ weights.shared).clamp(min=0).sqrt()
    return replace(weights, shared=weights.shared * (max_norm / (norm + 1e-6)).clamp(max=1))
