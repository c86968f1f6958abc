"""The immutable facts of one step: its batches, its tasks, and the factors of their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastmtl._loss.base import over
from fastmtl.engine.comm import Comm
from fastmtl.engine.labels import labelled_entries
from fastmtl.engine.losses import Problem
from fastmtl.engine.model import Labels, Tasks
from fastmtl.engine.scaling import LossScale
from fastmtl.support.dtypes import wide_dtype

__all__ = ["Batch", "LearningRates", "StepContext", "batch_shares", "mean_losses", "step_losses"]

LearningRates: TypeAlias = Callable[[Sequence[nn.Parameter]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of a step.

    Attributes:
        inputs: The inputs; by task if multi-input.
        labels: The labels by task.
        tasks: The tasks of the step.
        share: (T,) weight of this batch, in this process, in the mean losses of the step; None for 1.
        factor: What the losses are multiplied by before differentiation, a scalar or (T,); None for 1.
        final: Whether its rows are final: no other batch's rows are added to them.
        is_first: Whether it is the first of the step.
    """

    inputs: object
    labels: Labels
    tasks: Tasks
    share: Tensor | None = None
    factor: Tensor | None = None
    final: bool = True
    is_first: bool = True

    def of(self, task: str) -> object:
        """Return the inputs of one task of a multi-input batch."""
        assert isinstance(self.inputs, Mapping)
        return self.inputs[task]

    def factors(self) -> Sequence[Tensor | None]:
        """Return the factor of each task's loss, None for 1, as tensors that may be modified."""
        if self.factor is None:
            return [None] * len(self.tasks)
        # Autograd may return the cotangent itself as a gradient.
        return self.factor.expand(len(self.tasks)).clone().unbind()

    def seeds(self, losses: Sequence[Tensor], weights: Tensor | None = None) -> list[Tensor | None]:
        """Return the cotangents of the losses: their weights (T,), ones if None, times the batch's factor."""
        if weights is None:
            seeds = self.factors()
        else:
            weights = weights if self.factor is None else weights * self.factor
            if losses and all(loss.dtype == losses[0].dtype for loss in losses):
                weights = weights.to(losses[0].dtype)
            seeds = weights.unbind()
        return [None if seed is None else seed.to(loss.dtype) for seed, loss in zip(seeds, losses, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """One step.

    Attributes:
        batches: The samples of the strategy, or the batches to accumulate.
        tasks: The tasks of the step, by name.
        scaling: What float16 multiplies the losses by.
        rates: Returns the optimizer's learning rates of given parameters.
        row_shares: With several processes: this process's share of the labels behind each row, (T,) or (samples T,).
    """

    batches: tuple[Batch, ...]
    tasks: Tasks
    scaling: LossScale
    rates: LearningRates
    row_shares: Tensor | None = None

    @classmethod
    def of(
        cls,
        batches: Sequence[tuple[object, Labels]],
        tasks: Tasks,
        problem: Problem,
        comm: Comm,
        samples: int,
        scaling: LossScale,
        rates: LearningRates,
    ) -> StepContext:
        """Return the context of a step with these inputs and labels.

        With ``samples`` above 1 each batch is one sample of the strategy; otherwise several batches are accumulated.
        """
        labels = [{**dict.fromkeys(tasks), **known} for _, known in batches]
        shares: Sequence[Tensor | None] = [None] * len(batches)
        row_shares = None
        if comm.shares_batches or (len(batches) > 1 and samples == 1):
            # Each sample has its own rows; accumulated batches share theirs.
            of_rows = [[of_sample] for of_sample in labels] if samples > 1 else [labels]
            shares_of_rows = [batch_shares(problem, tasks, part, comm) for part in of_rows]
            shares = list(torch.cat(shares_of_rows))
            row_shares = torch.cat([part.sum(0) for part in shares_of_rows]) if comm.shares_batches else None
        final = samples > 1 or len(batches) == 1
        of_step = [
            Batch(inputs, of_batch, tasks, share, scaling.factor(share), final, is_first=number == 0)
            for number, ((inputs, _), of_batch, share) in enumerate(zip(batches, labels, shares, strict=True))
        ]
        return cls(batches=tuple(of_step), tasks=tasks, scaling=scaling, rates=rates, row_shares=row_shares)


def step_losses(problem: Problem, ctx: StepContext, losses: Tensor, comm: Comm) -> Tensor:
    """Return the losses (T,) of a step from those of its batches (n, T): samples' mean, or accumulated batches' sum."""
    if len(ctx.batches) > 1 and ctx.batches[0].final:
        return mean_losses(problem, ctx.tasks, losses, [batch.labels for batch in ctx.batches], comm)
    return losses[0] if losses.shape[0] == 1 else losses.sum(0)


def batch_shares(problem: Problem, tasks: Tasks, labels: Sequence[Labels], comm: Comm) -> Tensor:
    """Return the share (n, T) of each of n batches in the labels of all of them, in all processes.

    Losses are means over the labels that are present, or weighted means (:meth:`AbsLoss.divisor`); multiplied by these
    shares they add up to the mean over all labels.
    """
    device = problem.model.device
    dtype = wide_dtype(device)
    counts = torch.stack(
        [
            torch.stack(
                [_scalar(labelled_entries(problem.losses[task], of_batch[task]), dtype, device) for task in tasks]
            )
            for of_batch in labels
        ]
    )
    return over(counts, comm.all_reduce(counts.sum(0)))


def mean_losses(problem: Problem, tasks: Tasks, losses: Tensor, labels: Sequence[Labels], comm: Comm) -> Tensor:
    """Return the mean (T,) of the losses (n, T) of batches, in all processes, weighted by their numbers of labels."""
    shares = comm.all_reduce(batch_shares(problem, tasks, labels, comm))
    return (losses * shares).sum(0).to(losses.dtype)


def _scalar(count: int | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a scalar tensor, filled on the device: a copy from the host would wait."""
    return count.to(device, dtype) if isinstance(count, Tensor) else torch.full((), count, dtype=dtype, device=device)
