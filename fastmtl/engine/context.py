"""The facts of one step, frozen: which batches, which tasks, and what their losses are multiplied by."""

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
        share: (T,) share of this batch, and this process, in the losses of the step; None for 1.
        factor: What the losses are multiplied by before they are differentiated, a scalar or (T,); None for 1.
        final: Whether its rows are those of the step: no other batch's are added to them.
    """

    inputs: object
    labels: Labels
    tasks: Tasks
    share: Tensor | None = None
    factor: Tensor | None = None
    final: bool = True

    def of(self, task: str) -> object:
        """Return the inputs of a task that has its own."""
        assert isinstance(self.inputs, Mapping)
        return self.inputs[task]

    def factors(self) -> Sequence[Tensor | None]:
        """Return what the loss of each task is multiplied by, None for 1; what is returned may be written into."""
        if self.factor is None:
            return [None] * len(self.tasks)
        # A gradient may be the seed itself.
        return self.factor.expand(len(self.tasks)).clone().unbind()

    def seeds(self, losses: Sequence[Tensor], weights: Tensor | None = None) -> list[Tensor | None]:
        """Return the cotangents of the losses: their weights (T,), ones if None, times the factor on all losses."""
        if weights is None:
            seeds = self.factors()
        else:
            seeds = (weights if self.factor is None else weights * self.factor).unbind()
        return [None if seed is None else seed.to(loss.dtype) for seed, loss in zip(seeds, losses, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """One step.

    Attributes:
        batches: As many as the strategy takes samples, or as are accumulated.
        tasks: The tasks of the step, by name.
        scaling: What float16 multiplies the losses by.
        rates: Returns the learning rates that the model's optimizer has for parameters.
        row_shares: With several processes: this process's share in the labels behind each row, (T,) or (samples T,).
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
        """Return the context of a step.

        Args:
            batches: Inputs and labels.
            tasks: The tasks of the step.
            problem: The model and its losses.
            comm: The other processes.
            samples: Batches that the strategy takes each for itself; if 1, several are accumulated.
            scaling: What float16 multiplies the losses by.
            rates: Returns the learning rates that the model's optimizer has for parameters.
        """
        labels = [{**dict.fromkeys(tasks), **known} for _, known in batches]
        shares: Sequence[Tensor | None] = [None] * len(batches)
        row_shares = None
        if comm.shares_batches or (len(batches) > 1 and samples == 1):
            # Each sample has rows of its own; accumulated batches make one together.
            of_rows = [[of_sample] for of_sample in labels] if samples > 1 else [labels]
            shares_of_rows = [batch_shares(problem, tasks, part, comm) for part in of_rows]
            shares = list(torch.cat(shares_of_rows))
            row_shares = torch.cat([part.sum(0) for part in shares_of_rows]) if comm.shares_batches else None
        final = samples > 1 or len(batches) == 1
        made = [
            Batch(inputs, of_batch, tasks, share=share, factor=scaling.factor(share), final=final)
            for (inputs, _), of_batch, share in zip(batches, labels, shares, strict=True)
        ]
        return cls(batches=tuple(made), tasks=tasks, scaling=scaling, rates=rates, row_shares=row_shares)


def step_losses(problem: Problem, ctx: StepContext, losses: Tensor, comm: Comm) -> Tensor:
    """Return the losses (T,) of a step from those of its batches (n, T): samples' mean; accumulated ones add up."""
    if len(ctx.batches) > 1 and ctx.batches[0].final:
        return mean_losses(problem, ctx.tasks, losses, [batch.labels for batch in ctx.batches], comm)
    return losses.sum(0)


def batch_shares(problem: Problem, tasks: Tasks, labels: Sequence[Labels], comm: Comm) -> Tensor:
    """Return the share (n, T) of each of n batches in the labels of all of them, in all processes.

    Losses are means over the labels that are there, or weighted ones (:meth:`AbsLoss.divisor`); multiplied by these
    shares they add up to the mean over all.
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
    """Return the mean (T,) of batches' losses (n, T), those of all processes, by how many labels each has."""
    shares = comm.all_reduce(batch_shares(problem, tasks, labels, comm))
    return (losses * shares).sum(0).to(losses.dtype)


def _scalar(count: int | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a tensor; it is filled in on the device, as a copy from the host would wait."""
    return count.to(device, dtype) if isinstance(count, Tensor) else torch.full((), count, dtype=dtype, device=device)
