"""What bilevel strategies see: losses and gradients of two halves of a batch, here and where a step would lead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.distributed.comm import Exchange
from fastmtl.engine.buffers import keeping_buffers
from fastmtl.engine.halves import halves, joined
from fastmtl.engine.losses import Problem
from fastmtl.engine.methods.routes import forward
from fastmtl.engine.regions import Regions
from fastmtl.trainer.log.profiling import part

__all__ = ["LookAhead"]

Row = list[Tensor | None]


class LookAhead:
    """A batch cut in two, and the network's losses and gradients on its halves, at parameters of choice.

    Gradients are lists over all trainable parameters, None where a parameter has none.

    Args:
        problem: The model and its losses.
        regions: The problem's functions, compiled or not.
        batch: Inputs and labels.
        lr: Learning rate of the model's optimizer.
        exchange: The other processes, if there are any; losses and gradients are then those of all of them.

    Attributes:
        inner: The half for the lower level: the training loss that the weights shape.
        outer: The half for the upper level: the losses that the weights are judged by.
    """

    def __init__(
        self,
        problem: Problem,
        regions: Regions,
        batch: tuple[Any, Any],
        lr: float,
        exchange: Exchange | None = None,
    ) -> None:
        self.problem = problem
        self.regions = regions
        self.inner, self.outer = halves(batch)
        self.lr = lr
        self.exchange = exchange
        self.params = [*problem.shared_params, *problem.own_params]
        self._moved = False
        self._seen: list[tuple[Any, Tensor, dict[str, Any]]] = []

    @torch.no_grad()
    def losses(self, batch: tuple[Any, Any]) -> Tensor:
        """Return the (T,) losses."""
        self._weigh(batch)
        return self._of_all(torch.stack(list(forward(self.problem, self.regions, *batch)[0])))

    def rows(self, batch: tuple[Any, Any]) -> tuple[Tensor, list[Row]]:
        """Return the (T,) losses and the gradient of each."""
        losses, detached = self._forward(batch)
        seeds = self._seeds(losses, torch.ones_like(detached))
        with part("VJPs"):
            rows: list[Row] = [
                list(torch.autograd.grad(loss, self.params, seed, t + 1 < len(losses), allow_unused=True))
                for t, (loss, seed) in enumerate(zip(losses, seeds, strict=True))
            ]
        return detached, [self._summed(row) for row in rows]

    def gradient(self, batch: tuple[Any, Any], weights: Tensor) -> tuple[Tensor, Row]:
        """Return the (T,) losses and the gradient of their weighted sum."""
        losses, detached = self._forward(batch)
        with part("VJPs"):
            row = torch.autograd.grad(losses, self.params, self._seeds(losses, weights), allow_unused=True)
        return detached, self._summed(list(row))

    @contextmanager
    def moved(self) -> Iterator[None]:
        """Let :meth:`move` change the parameters; at the end they, and the buffers, are what they were."""
        kept = [param.detach().clone() for param in self.params]
        self._moved = True
        try:
            with keeping_buffers(self.problem.model):
                yield
        finally:
            self._moved = False
            with torch.no_grad():
                for param, value in zip(self.params, kept, strict=True):
                    param.copy_(value)

    def weighted(self, rows: Sequence[Row], weights: Tensor) -> Row:
        """Return ``sum_t weights_t rows_t``."""
        return cast(Row, ops.combine(rows, weights))

    @torch.no_grad()
    def move(self, row: Row, amount: float | Tensor) -> None:
        """Add ``amount`` times a gradient to the parameters."""
        for param, grad in zip(self.params, row, strict=True):
            if grad is not None:
                param.add_(grad * amount)

    def seen(self) -> tuple[Tensor, dict[str, Any]]:
        """Return losses and predictions of the whole batch, from passes on both halves at the model's parameters."""
        labels, losses, preds = zip(*self._seen, strict=True)
        mean = self.problem.mean_losses(torch.stack(losses), labels, self.exchange)
        # A single row is both halves, here if not in other processes.
        return mean, preds[0] if self.inner is self.outer else joined(preds)

    def _forward(self, batch: tuple[Any, Any]) -> tuple[Sequence[Tensor], Tensor]:
        self._weigh(batch)
        losses, preds = forward(self.problem, self.regions, *batch)
        detached = self._of_all(torch.stack([loss.detach() for loss in losses]))
        if not self._moved:
            self._seen.append((batch[1], detached, preds))
        return losses, detached

    def _weigh(self, batch: tuple[Any, Any]) -> None:
        """Find this process's share in a batch."""
        self.problem.share = None if self.exchange is None else self.problem.shares([batch[1]], self.exchange)[0]

    def _of_all(self, losses: Tensor) -> Tensor:
        share = self.problem.share
        return losses if self.exchange is None or share is None else self.exchange.mean(losses, share)

    def _seeds(self, losses: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
        factors = self.problem.factors()
        weights = weights if factors is None else weights * factors
        return [weight.to(loss.dtype) for weight, loss in zip(weights, losses, strict=True)]

    def _summed(self, row: Row) -> Row:
        return row if self.exchange is None else self.exchange.whole_row(row)
