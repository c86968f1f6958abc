"""Losses and gradients of two halves of a batch, before and after a trial step, for bilevel strategies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch, StepContext, batch_shares, mean_losses
from fastmtl.engine.cut import Structure
from fastmtl.engine.engine import Engine
from fastmtl.engine.gradients import coalesced
from fastmtl.engine.halving import are_by_row
from fastmtl.engine.hidden import VJP
from fastmtl.engine.jacobian import Differentiated, detached
from fastmtl.engine.methods.base import forward
from fastmtl.engine.model import Labels, preserving_buffers
from fastmtl.engine.pullback import Sum
from fastmtl.engine.regions import Regions
from fastmtl.engine.trees import joined, leaves
from fastmtl.engine.vjp import vjp
from fastmtl.engine.weights import Row, Weights
from fastmtl.errors import UsageError
from fastmtl.support.profiling import part

__all__ = ["LookAhead", "LookaheadEngine", "LookedAhead"]

# Places in a parameter, None for the whole of it, and what was there.
_Change = tuple[tuple[Tensor, ...] | None, Tensor]


class LookAhead:
    """A batch cut in two, and the network's losses and gradients on its halves, at parameters the strategy chooses.

    Gradients are lists over all trainable parameters, None where a parameter has none.

    ``rates`` are the learning rates of the optimizer, one for all parameters or one for each. Losses and gradients are
    those of all processes.

    Attributes:
        lr: The greatest learning rate.
        inner: The half for the lower level: the training loss that the weights shape.
        outer: The half for the upper level: the losses that the weights are judged by.
    """

    def __init__(
        self, batch: Batch, rates: float | Sequence[float], regions: Regions, comm: Comm, differentiate: VJP = vjp
    ) -> None:
        self.regions = regions
        self.differentiate = differentiate
        self.problem = regions.problem
        self.comm = comm
        self.params = self.problem.trained()
        of_params = [rates] * len(self.params) if isinstance(rates, float) else rates
        self.lr = max(of_params, default=0.0)
        self._shares = [rate / self.lr if self.lr else 1.0 for rate in of_params]
        # In a block of moved, what its moves have changed.
        self._kept: dict[Tensor, list[_Change]] | None = None
        self._seen: list[tuple[Batch, Tensor, Mapping[str, object]]] = []
        self._batch = batch
        self.inner, self.outer = (self._half(batch, *half) for half in self.problem.halves(batch.inputs, batch.labels))

    def _half(self, batch: Batch, inputs: object, labels: Labels) -> Batch:
        share = None
        if self.comm.shares_batches:
            share = batch_shares(self.problem, batch.tasks, [labels], self.comm)[0]
        return replace(batch, inputs=inputs, labels=labels, share=share, factor=share)

    def losses(self, batch: Batch) -> Tensor:
        """Return the (T,) losses."""
        with _naming_halves():
            losses, _ = self.problem.without_graph(partial(forward, self.regions, batch))
        return self.comm.mean(torch.stack(list(losses)), batch.share)

    def rows(self, batch: Batch) -> tuple[Tensor, list[Row]]:
        """Return the (T,) losses and the gradient of each."""
        losses, known = self._forward(batch)
        seeds = batch.seeds(losses, torch.ones_like(known))
        with part("VJPs"):
            rows: list[Row] = [
                self.differentiate([loss], [seed], self.params, t + 1 < len(losses))
                for t, (loss, seed) in enumerate(zip(losses, seeds, strict=True))
            ]
        return known, [self.comm.all_reduce_row(row, self.params) for row in rows]

    def gradient(self, batch: Batch, weights: Tensor) -> tuple[Tensor, Row]:
        """Return the (T,) losses and the gradient of their weighted sum."""
        losses, known = self._forward(batch)
        with part("VJPs"):
            row = self.differentiate(losses, batch.seeds(losses, weights), self.params, False)
        return known, self.comm.all_reduce_row(row, self.params)

    @contextmanager
    def moved(self) -> Iterator[None]:
        """Let :meth:`move` change the parameters in the block; then restore parameters and buffers.

        Of a table that is moved along a sparse gradient, the touched rows are kept and restored.
        """
        before = self._kept
        self._kept = kept = dict[Tensor, list[_Change]]()
        try:
            with preserving_buffers(self.problem.model):
                yield
        finally:
            self._kept = before
            _restore(kept)

    def weighted(self, rows: Sequence[Row], weights: Tensor) -> Row:
        """Return ``sum_t weights_t rows_t``."""
        return cast(Row, ops.combine(rows, weights))

    def by_rates(self, row: Row) -> Row:
        """Return a gradient times each parameter's learning rate, divided by :attr:`lr`."""
        shares = zip(row, self._shares, strict=True)
        return [grad if grad is None or share == 1 else grad * share for grad, share in shares]

    @torch.no_grad()
    def move(self, row: Row, amount: float | Tensor) -> None:
        """Add ``amount`` times a gradient to the parameters, in a block of :meth:`moved`."""
        assert self._kept is not None
        for param, grad in zip(self.params, row, strict=True):
            if grad is None:
                continue
            whole = coalesced(grad)
            kept = self._kept.setdefault(param, [])
            # Where the whole of it is kept, that is the last entry.
            if not kept or kept[-1][0] is not None:
                places = tuple(whole._indices()) if whole.is_sparse else None
                kept.append((places, param.detach().clone() if places is None else param.detach()[places]))
            param.add_(whole * amount)

    def seen(self) -> tuple[Tensor, Mapping[str, object]]:
        """Return losses and predictions of the whole batch, from passes on both halves at the model's parameters."""
        batches, losses, preds = zip(*self._seen, strict=True)
        labels = [batch.labels for batch in batches]
        mean = mean_losses(self.problem, batches[0].tasks, torch.stack(losses), labels, self.comm)
        return mean, self._whole(*preds)

    def _whole(self, first: Mapping[str, object], second: Mapping[str, object]) -> Mapping[str, object]:
        """Return the predictions of the whole batch: those of the halves concatenated where they have rows."""
        inner, outer = self.inner.labels, self.outer.labels
        if are_by_row(first, inner) and are_by_row(second, outer) and _are_alike(first, second):
            # Both halves may be the same batch of a single row.
            return {
                task: pred if inner.get(task) is outer.get(task) else joined([pred, second[task]])
                for task, pred in first.items()
            }
        with preserving_buffers(self.problem.model):
            return self.problem.without_graph(partial(forward, self.regions, self._batch))[1]

    def _forward(self, batch: Batch) -> tuple[Sequence[Tensor], Tensor]:
        with _naming_halves():
            losses, preds = forward(self.regions, batch)
        known = self.comm.mean(torch.stack([loss.detach() for loss in losses]), batch.share)
        if self._kept is None:
            self._seen.append((batch, known, preds))
        return losses, known


@torch.no_grad()
def _restore(kept: Mapping[Tensor, Sequence[_Change]]) -> None:
    """Undo moves, the last one first."""
    for param, changes in kept.items():
        for places, value in reversed(changes):
            if places is None:
                param.copy_(value)
            else:
                param[places] = value


@contextmanager
def _naming_halves() -> Iterator[None]:
    """Explain batch normalisation's error for a single row: the row is half a batch."""
    try:
        yield
    except ValueError as cause:
        if "Expected more than 1 value per channel" not in str(cause):
            raise
        raise UsageError(
            "A half of a batch has too few rows for batch normalisation, which needs two: a strategy that looks ahead "
            "trains on halves. Let split_batch return larger ones, or drop the small last batch (drop_last=True)."
        ) from cause


def _are_alike(first: object, second: object) -> bool:
    """Return whether predictions have the same shapes but for the rows; sequences may be padded differently."""
    pairs = zip(leaves(first), leaves(second), strict=True)
    return all(a.shape[1:] == b.shape[1:] for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))


class LookedAhead(Differentiated):
    """A step in which a bilevel strategy decides the update, or the weights of the last batch.

    Attributes:
        losses: (T,) losses of the step, once the gradients are written.
        preds: Predictions by task, in a list of one, once the gradients are written.
    """

    def __init__(self, ctx: StepContext, ahead: LookAhead) -> None:
        self.ahead = ahead
        self._last = ctx.batches[-1]

    def write_grads(self, weights: Weights) -> None:
        """Write the update, or differentiate the last batch with the weights."""
        ahead, comm = self.ahead, self.ahead.comm
        if weights.rows is not None:
            comm.set_grads(ahead.params, ahead.weighted(weights.rows, weights.shared))
            self.losses, preds = ahead.seen()
            self.preds = [preds]
            return
        comm.unshard()
        attached, preds = forward(ahead.regions, self._last)
        losses, preds = detached(attached, preds)
        self.losses, self.preds = comm.mean(losses, self._last.share), [preds]
        Sum(attached, self._last).backward(weights.shared)
        comm.all_reduce_grads(self._last.tasks)


class LookaheadEngine(Engine):
    """For bilevel strategies: they look ahead on the first batch and decide the update, or the last batch's weights."""

    keeps_grads = False
    possible = True

    def __init__(self, structure: Structure, regions: Regions, comm: Comm) -> None:
        self.structure = structure
        self.regions = regions
        self.comm = comm

    def differentiate(self, ctx: StepContext, known: Weights | None) -> LookedAhead:
        """Return the step with the halves of the first batch; no pass runs yet."""
        self.comm.unshard()
        self.structure.learn_decoders(ctx.batches[0])
        self.structure.learn(ctx.batches[0], cuts=False)
        differentiate = self.structure.by_backward or vjp
        rates = ctx.rates(self.regions.problem.trained())
        return LookedAhead(ctx, LookAhead(ctx.batches[0], rates, self.regions, self.comm, differentiate))
