"""The base of all methods of computing the gradients of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch
from fastmtl.engine.cut import Structure
from fastmtl.engine.gradients import TaskGradients, WeightedGradients
from fastmtl.engine.hidden import VJP
from fastmtl.engine.jacobian import BatchGradients, Known, detached
from fastmtl.engine.regions import Regions
from fastmtl.engine.tables import TableVJP
from fastmtl.engine.vjp import vjp
from fastmtl.engine.weights import Row, Rows, Weights
from fastmtl.support.kinds import Settings, State
from fastmtl.support.profiling import part

__all__ = ["MANY_TASKS", "Method", "forward", "mean_of_forwards"]

# With fewer tasks, to differentiate with respect to what one does not reach costs less than to find that out.
MANY_TASKS = 8


def forward(regions: Regions, batch: Batch) -> tuple[Sequence[Tensor], Mapping[str, object]]:
    """Run the whole network, task by task if multi-input; return T losses and the predictions."""
    with part("forward"):
        if not regions.problem.model.multi_input:
            return regions.whole(batch.inputs, batch.labels, batch.tasks)
        losses, preds = [], {}
        for task in batch.tasks:
            loss, preds[task] = regions.single(batch.of(task), batch.labels[task], task)
            losses.append(loss)
        return losses, preds


def mean_of_forwards(regions: Regions, batches: Sequence[Batch], comm: Comm) -> Tensor:
    """Return the losses (n, T) of a forward pass of each batch, over all processes, times the batch's share."""
    comm.unshard()
    passes = (regions.problem.without_graph(partial(forward, regions, batch))[0] for batch in batches)
    return torch.stack(
        [comm.mean(torch.stack(list(losses)), batch.share) for losses, batch in zip(passes, batches, strict=True)]
    )


class Method:
    """One forward pass and the vector-Jacobian products (VJPs) of a batch.

    ``weighs_heads`` says whether the gradients of the task-specific parameters will be weighted.

    Attributes:
        possible: False once the method is known to do the same as a simpler one, so that it need not be timed.
        only_if_cut: Whether that is so where trunk and heads cannot be differentiated separately.
    """

    only_if_cut: ClassVar[bool] = False
    possible = True

    def __init__(self, structure: Structure, regions: Regions, comm: Comm, weighs_heads: bool) -> None:
        self.structure = structure
        self.problem = structure.problem
        self.regions = regions
        self.comm = comm
        self.weighs_heads = weighs_heads
        # Whether the first graph has some; unknown before.
        self._has_tables: bool | None = None

    @property
    def vjp(self) -> VJP:
        """Return the function that computes VJPs of this network; see `fastmtl.engine.vjp.vjp`."""
        return self.structure.by_backward or vjp

    def tables_of(self, outputs: Sequence[Tensor]) -> VJP | None:
        """Return the function for VJPs of ``outputs``, the gradients of whose tables have only the touched rows.

        None if plain VJPs do.
        """
        # A graph that is being compiled has nothing to walk through, and must not depend on what is known of tables.
        if torch.compiler.is_compiling() or self.structure.by_backward is not None:
            return self.structure.by_backward
        if self.comm.shares_batches or self._has_tables is False:
            return None
        tables = TableVJP(outputs, self.problem.shared_params)
        if self._has_tables is None:
            self._has_tables = bool(tables.tables)
        self.comm.combination.dense |= tables.dense
        return tables if tables.tables else None

    def __call__(self, batch: Batch) -> BatchGradients:
        """Run the forward pass and the VJPs of all tasks."""
        self.prepare(batch)
        return self.gradients_of(batch)

    def prepare(self, batch: Batch) -> None:
        """Examine the network before it is differentiated; called for every batch."""

    def gradients_of(self, batch: Batch) -> BatchGradients:
        """Run the forward pass and the VJPs of all tasks, after :meth:`prepare`."""
        raise NotImplementedError

    def combined(self, batch: Batch, weights: Weights) -> BatchGradients:
        """Run one VJP of the weighted losses and return :meth:`known`; by default T VJPs, as a call does."""
        return self(batch)

    def state_dict(self) -> State:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: Settings) -> None:
        """Go on where `state_dict` was taken."""

    def known(
        self, losses: Sequence[Tensor], preds: Mapping[str, object], shared: Row, task_grads: WeightedGradients
    ) -> BatchGradients:
        """Return the result of :meth:`combined`, from the gradients of the shared and the other parameters."""
        return BatchGradients(*detached(losses, preds), [shared], task_grads, Known(self.problem.shared_params))

    def task_gradients(
        self, batch: Batch, losses: Sequence[Tensor], leaves: Sequence[Sequence[Tensor]]
    ) -> tuple[Rows, TaskGradients]:
        """Differentiate the losses down to the cut features and the task-specific parameters.

        ``leaves`` holds for each of the T losses the cut features it depends on. Returns the gradients of each task's
        leaves, and of the parameters.
        """
        task_params: Sequence[nn.Parameter] = self.problem.task_params
        flat = [leaf for of_task in leaves for leaf in of_task]
        seeds = batch.seeds(losses)
        if not self.structure.coupled and (not self.weighs_heads or self.structure.owners is not None):
            grads = self.vjp(losses, seeds, [*flat, *task_params], False)
            parts = [grads[len(flat) :]]
            rest = iter(grads)
            cotangents = [[next(rest) for _ in of_task] for of_task in leaves]
        else:
            parts, cotangents = [], []
            for t, loss in enumerate(losses):
                grads = self.vjp([loss], [seeds[t]], [*leaves[t], *task_params], t + 1 < len(losses))
                cotangents.append(grads[: len(leaves[t])])
                parts.append(grads[len(leaves[t]) :])
        return cotangents, TaskGradients(task_params, parts, self.structure.places(batch.tasks))
