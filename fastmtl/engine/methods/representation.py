"""``rep_grad``: the rows are gradients of the representations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmtl.engine.context import Batch
from fastmtl.engine.gradients import sum_present
from fastmtl.engine.jacobian import BatchGradients, detached
from fastmtl.engine.losses import cut_features
from fastmtl.engine.methods.base import Method, forward
from fastmtl.engine.pullback import Representations
from fastmtl.engine.weights import Rows
from fastmtl.errors import UsageError
from fastmtl.support.profiling import part

__all__ = ["ForwardRepresentation", "Representation"]

# Representations (a single one or T), losses, predictions, and the cut representations that decoders read.
Represented = tuple[Sequence[Tensor], Sequence[Tensor], Mapping[str, object], Mapping[str, Tensor]]


class Representation(Method):
    """All heads are differentiated at once; one VJP of the weighted gradients of the representations follows."""

    def prepare(self, batch: Batch) -> None:
        """Refuse decoders that use shared parameters; find the owners of parameters if their gradients are weighted."""
        model = self.problem.model
        cuts = model.splits and not model.multi_input
        structure = self.structure
        if structure.learn(batch, cuts) and structure.by_backward is None and not structure.leaves_out:
            raise UsageError(f"rep_grad must be False here, as {self.structure.against_cut}.")
        if self.weighs_heads and not model.multi_input:
            self.structure.learn_owners(batch)

    def gradients_of(self, batch: Batch) -> BatchGradients:
        """Run the forward pass and the backward pass of the heads."""
        reps, losses, preds, decoded = self._represent(batch)
        cuts = [decoded[task] for task in batch.tasks]
        starts = self._starts(batch, reps, losses, decoded)
        with part("VJPs"):
            rep_grads, task_grads = self.task_gradients(batch, losses, starts)
        sums = [sum_present(of_task) for of_task in rep_grads]
        grads = [torch.zeros_like(cut) if grad is None else grad for grad, cut in zip(sums, cuts, strict=True)]
        if len({grad.shape[1:].numel() for grad in grads}) > 1:
            raise UsageError(
                "rep_grad needs representations of one size for all tasks, got "
                + ", ".join(f"{task}: {tuple(cut.shape)}" for task, cut in zip(batch.tasks, cuts, strict=True))
                + "."
            )
        rows: Rows = [[grad.reshape(len(grad), -1).sum(0)] for grad in grads]
        return BatchGradients(*detached(losses, preds), rows, task_grads, Representations(reps, grads))

    def _starts(
        self, batch: Batch, reps: Sequence[Tensor], losses: Sequence[Tensor], decoded: Mapping[str, Tensor]
    ) -> list[list[Tensor]]:
        """Return the cut representations that each loss depends on: its task's, or all where losses are coupled."""
        if not self.problem.model.splits:
            self.structure.learn_coupling(batch.tasks, losses, {task: [cut] for task, cut in decoded.items()})
        if not self.structure.coupled:
            return [[decoded[task]] for task in batch.tasks]
        if len(reps) > 1:
            raise UsageError(
                f"rep_grad must be False for {self.problem.model.architecture_name} here: some loss depends on the "
                "predictions of several tasks, each of which has its own representation."
            )
        return [list(decoded.values()) for _ in batch.tasks]

    def _represent(self, batch: Batch) -> Represented:
        tasks = batch.tasks
        with part("forward"):
            if self.problem.model.multi_input:
                apart = tuple(self.regions.single_rep(batch.of(task), task) for task in tasks)
                cuts = {task: _cut(rep) for task, rep in zip(tasks, apart, strict=True)}
                losses, preds = [], {}
                for task, cut in cuts.items():
                    loss, preds[task] = self.regions.single_decode(cut, batch.labels[task], task)
                    losses.append(loss)
                return apart, losses, preds, cuts
            decoded = self.problem.decoded(tasks)
            reps = self.regions.reps(batch.inputs, tasks)
            by_task = dict(zip(decoded, reps if len(reps) > 1 else [reps[0] for _ in decoded], strict=True))
            cuts = {task: _cut(rep) for task, rep in by_task.items()}
            scored, preds = self.regions.decode(list(cuts.values()), batch.labels, tasks)
            return reps if len(reps) == 1 else [by_task[task] for task in tasks], scored, preds, cuts


class ForwardRepresentation(Representation):
    """For an architecture that overrides ``forward`` as a whole and calls ``_prepare_rep`` in it."""

    def _represent(self, batch: Batch) -> Represented:
        model = self.problem.model
        losses, preds = forward(self.regions, batch)
        if set(batch.tasks) - set(model.rep_tasks):
            raise UsageError(
                f"rep_grad must be False for {model.architecture_name}: its forward passes no representation to "
                "_prepare_rep."
            )
        rep = model.rep
        reps = tuple(rep[task] for task in batch.tasks) if isinstance(rep, dict) else (rep,)
        return reps, losses, preds, model.rep_tasks


def _cut(rep: Tensor) -> Tensor:
    (alias,) = cut_features((rep,))
    if not isinstance(alias, Tensor):
        raise UsageError(f"rep_grad needs a representation that is a tensor, got a {type(rep).__name__}.")
    return alias
