"""The gradients of all tasks in one step, from the Gram matrix to ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.engine.comm import Comm
from fastmtl.engine.context import StepContext, step_losses
from fastmtl.engine.gradients import TaskGradients, aligned, dense_rows, set_grads, summed
from fastmtl.engine.losses import Problem
from fastmtl.engine.model import Tasks
from fastmtl.engine.scaling import LossScale
from fastmtl.engine.trees import detached_tree
from fastmtl.engine.weights import Rows, Weights
from fastmtl.support.profiling import part

__all__ = [
    "BatchGradients",
    "Combine",
    "Decide",
    "Differentiated",
    "HasRows",
    "Jacobian",
    "Known",
    "Pullback",
    "detached",
]


class Differentiated(Protocol):
    """The result of an engine: losses of a step whose gradients are written once the weights are known.

    Attributes:
        losses: (T,) losses of the step; with accumulated batches complete only after :meth:`write_grads`.
        preds: Predictions by task, of the last sample or of each accumulated batch; complete as the losses are.
    """

    losses: Tensor
    preds: list[Mapping[str, object]]

    @property
    def gram_error(self) -> Tensor | None:
        """Return the error of a Gram matrix that was estimated, where it was measured."""
        return None

    def write_grads(self, weights: Weights) -> None:
        """Fill all ``.grad`` of the network."""


# From Gram matrices, and the places of their groups if they are not all, to weights.
Decide: TypeAlias = Callable[[Tensor, Sequence[int] | None], Weights]


class HasRows(Protocol):
    """An object with collected rows, which may be collected on first access."""

    @property
    def rows(self) -> Rows:
        """Return the rows summed over the processes, or this process's pieces of them."""


class Pullback:
    """How weighted rows become gradients of the shared parameters.

    Rows are gradients, or tensors with the same Gram matrix. Subclasses define :meth:`write`.

    Attributes:
        exact_gram: Whether the Gram matrix is that of the gradients, not an estimate.
        gram_error: How far an estimate is from the exact one, where that was computed.
    """

    exact_gram: bool = True
    gram_error: Tensor | None = None

    def collect(self, rows: Rows, comm: Comm, final: bool) -> Rows:
        """Return the rows summed over the processes, or this process's pieces of them."""
        return comm.collect(rows, final)

    def gram(self, rows: Rows, groups: Sequence[int] | None, comm: Comm, shares: Tensor | None) -> Tensor:
        """Return the Gram matrix of collected rows; (L, T, T) with L groups of parameters."""
        return comm.gram(rows, groups, shares)

    @property
    def limits_by_gram(self) -> bool:
        """Whether the norm of the update is limited by its Gram matrix, not by the gradients that are written."""
        return self.exact_gram

    def decided(self, source: Jacobian, groups: Sequence[int] | None, decide: Decide) -> Weights:
        """Return the weights that ``decide`` gives to the Gram matrix, or to those of some groups at a time."""
        return decide(source.gram(groups), None)

    def absorb(self, other: Pullback) -> None:
        """Add another batch of the same step, whose rows are added to this one's."""
        raise NotImplementedError

    def join(self, other: Pullback) -> None:
        """Take another sample of the same step, whose rows follow this one's."""

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Fill ``.grad`` of the shared parameters, and all-reduce that of all others."""
        raise NotImplementedError


class Combine(Pullback):
    """The rows are gradients of the shared parameters; the update is their weighted sum."""

    def absorb(self, other: Pullback) -> None:
        """Do nothing: the batch has rows only."""

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Write the weighted sum of the rows."""
        comm.write_shared(source.rows if weights.rows is None else weights.rows, weights.shared, weights.groups, tasks)


class Known(Pullback):
    """The weights were known beforehand: the only row is the update."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = params

    def collect(self, rows: Rows, comm: Comm, final: bool) -> Rows:
        """Return the row as it is."""
        return rows

    def absorb(self, other: Pullback) -> None:
        """Do nothing: the batch has a row only."""

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Write the update."""
        set_grads(self.params, source.rows[0])
        comm.all_reduce_grads(tasks)


@dataclass(slots=True)
class BatchGradients:
    """The results of one forward pass and its VJPs.

    Attributes:
        losses: (T,) detached.
        preds: Predictions by task, detached, so that they keep no activations alive.
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
        """Add the gradients of another batch of the same step."""
        self.rows = summed(self.rows, other.rows)
        self.task_grads.absorb(other.task_grads)
        self.pullback.absorb(other.pullback)


def detached(losses: Tensor | Sequence[Tensor], preds: Mapping[str, object]) -> tuple[Tensor, Mapping[str, object]]:
    """Return the losses (T,) and the predictions without their graph."""
    if not isinstance(losses, Tensor):
        losses = torch.stack(list(losses)).detach()
    return losses, detached_tree(preds)


class Jacobian:
    """The gradients of T losses: T rows over the shared parameters, and those of the task-specific parameters.

    ``batches`` has one entry per sample of the strategy, or a single one where batches were accumulated; ``losses``
    (n, T) and ``preds`` are those of all n batches.

    Attributes:
        losses: (T,) losses of the step.
        strategy_losses: The losses that the strategy reads: (T,), or (samples, T).
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
        self.strategy_losses = losses if several else self.losses
        self.preds = preds[-1:] if several else preds
        self.pullback = batches[0].pullback
        self._batches = batches
        self._ctx = ctx
        self._comm = comm
        self._rows: Rows | None = None

    @property
    def gram_error(self) -> Tensor | None:
        """Return the error of a Gram matrix that was estimated, where it was measured."""
        return self.pullback.gram_error

    @property
    def rows(self) -> Rows:
        """Return the rows summed over the processes, or this process's pieces; the first access may wait for them."""
        if self._rows is None:
            rows = [row for batch in self._batches for row in batch.rows]
            self._rows = aligned(self.pullback.collect(rows, self._comm, self._ctx.batches[0].final)) if rows else rows
        return self._rows

    def gram(self, groups: Sequence[int] | None = None) -> Tensor:
        """Return the Gram matrix (R, R) of the R rows; (L, R, R) with the group, 0 .. L-1, of each shared parameter."""
        with part("gram"):
            gram = self.pullback.gram(self.rows, groups, self._comm, self._ctx.row_shares)
            return self._ctx.scaling.gram(gram)

    def decided(self, groups: Sequence[int] | None, decide: Decide) -> Weights:
        """Return the weights of groups of parameters, None for one group.

        ``decide`` is called with Gram matrices as :meth:`gram` returns them, of all groups or of those it gets the
        places of.
        """
        return self.pullback.decided(self, groups, decide)

    @property
    def scaling(self) -> LossScale:
        """Return what float16 multiplies the losses by."""
        return self._ctx.scaling

    @property
    def tasks(self) -> Tasks:
        """Return the tasks of the step."""
        return self._ctx.tasks

    @property
    def row_shares(self) -> Tensor | None:
        """Return this process's shares (T,) of the labels behind each row, with several processes."""
        return self._ctx.row_shares

    def unscaled_rows(self) -> Rows:
        """Return the rows without the loss scale of float16, all of them dense."""
        return dense_rows(self._ctx.scaling.rows(self.rows))

    def mean_gram(self, gram: Tensor) -> Tensor:
        """Return (T, T), or (L, T, T), matrices from the result of :meth:`gram`: the mean over samples."""
        size, rows = self.losses.shape[0], gram.shape[-1]
        if rows == size:
            return gram
        return torch.stack([gram[..., a : a + size, a : a + size] for a in range(0, rows, size)]).mean(0)

    def write_grads(self, weights: Weights) -> None:
        """Fill ``.grad``, of the shared parameters with the weighted sum of the rows.

        The task-specific gradients come first, as ``Pullback.write`` also all-reduces them.
        """
        heads = [None] * len(self._batches) if weights.heads is None else weights.heads.chunk(len(self._batches))
        with part("combine"):
            for batch, head_weights in zip(self._batches, heads, strict=True):
                batch.task_grads.write(head_weights)
        # The norm follows from the Gram matrix; weights that are held come without one, an estimate gives none.
        gram = weights.gram if weights.grams is None else weights.grams
        by_gram = gram is not None and self.pullback.limits_by_gram
        if weights.max_norm is not None and by_gram:
            assert gram is not None
            weights = replace(weights, shared=ops.cap_norm(gram, weights.shared, weights.max_norm))
        if weights.rows is not None:
            # The strategy made them without the loss scale that all other gradients carry.
            weights = replace(weights, shared=self._ctx.scaling.up(weights.shared))
        self.pullback.write(weights, self, self._comm, self._ctx.tasks)
        if weights.max_norm is not None and not by_gram:
            self._comm.clip_grad_norm(self._ctx.scaling.limit(weights.max_norm), shared_only=True)
