"""The whole network differentiated at once: one VJP per task, from the loss to all parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.engine.context import Batch
from fastmtl.engine.gradients import TaskGradients, WeightedGradients
from fastmtl.engine.graph import reach, root_nodes
from fastmtl.engine.jacobian import BatchGradients, Combine, detached
from fastmtl.engine.methods.base import MANY_TASKS, Method, forward
from fastmtl.engine.weights import Weights
from fastmtl.support.profiling import part

__all__ = ["Whole"]


class Whole(Method):
    """One VJP per task from the loss to all parameters.

    With inputs per task each task's graph is freed before the next one's forward pass.
    """

    def prepare(self, batch: Batch) -> None:
        """Find out whether the graph shows the use of all parameters, and whether losses of tasks are coupled."""
        if self.structure.learn(batch, cuts=False):
            self.regions.report(f"gradients come from backward(), as {self.structure.against_cut}")

    def gradients_of(self, batch: Batch) -> BatchGradients:
        """Run the forward pass and all VJPs."""
        problem, apart = self.problem, self.problem.model.multi_input and not self.structure.coupled
        losses: list[Tensor] = []
        preds: dict[str, object] = {}
        if not apart:
            batch_losses, batch_preds = forward(self.regions, batch)
            losses += batch_losses
            preds |= batch_preds
        rows, parts = [], []
        differentiate = None if apart else self.tables_of(losses)
        factors = batch.factors()
        places = [None] * len(batch.tasks) if apart else self._places(losses)
        for t, task in enumerate(batch.tasks):
            if apart:
                with part("forward"):
                    loss, preds[task] = self.regions.single(batch.of(task), batch.labels[task], task)
                losses.append(loss)
            with part("VJPs"):
                factor = factors[t]
                seed = None if factor is None else factor.to(losses[t].dtype)
                retain = not apart and t + 1 < len(batch.tasks)
                if apart:
                    differentiate = self.tables_of(losses[t:])
                row, grads = self.comm.row(
                    [losses[t]], [seed], problem.task_params, retain, batch.final, differentiate, places[t]
                )
            rows.append(row)
            parts.append(grads)
        return BatchGradients(*detached(losses, preds), rows, TaskGradients(problem.task_params, parts), Combine())

    def _places(self, losses: Sequence[Tensor]) -> list[list[int] | None]:
        """Return the places of the shared parameters that each of many losses reaches; of few, all of them."""
        few = len(losses) < MANY_TASKS or torch.compiler.is_compiling() or self.structure.by_backward is not None
        if few or any(loss.grad_fn is None for loss in losses):
            return [None] * len(losses)
        return reach(root_nodes(losses)).places_of(self.problem.shared_params, len(losses))

    def combined(self, batch: Batch, weights: Weights) -> BatchGradients:
        """Differentiate one weighted sum of the losses, or two where a parameter belongs to some of the tasks."""
        problem, structure, shared = self.problem, self.structure, weights.shared
        self.prepare(batch)
        if not problem.model.multi_input:
            structure.learn_owners(batch)
        losses, preds = forward(self.regions, batch)
        heads = torch.ones_like(shared) if weights.heads is None else weights.heads
        count = len(problem.shared_params)
        if structure.owners is not None and problem.low_precision != torch.float16:
            # Task-specific gradients come out multiplied by the shared weight, which is divided out again; for that it
            # must not be zero: 1e-12 of the greatest weight replaces it.
            greatest = shared.abs().max()
            least = 1e-12 * greatest.where(greatest > 0, 1.0)
            divisors = shared.where(shared.abs() > least, least)
            everything = [*problem.shared_params, *problem.task_params]
            grads = self.vjp(losses, batch.seeds(losses, divisors), everything, False)
            task_grads = TaskGradients(problem.task_params, [grads[count:]], structure.places(batch.tasks))
            return self.known(losses, preds, grads[:count], task_grads.weighted(heads / divisors))
        row = self.vjp(losses, batch.seeds(losses, shared), problem.shared_params, bool(problem.task_params))
        rest = self.vjp(losses, batch.seeds(losses, heads), problem.task_params, False)
        return self.known(losses, preds, row, WeightedGradients(problem.task_params, [rest]))
