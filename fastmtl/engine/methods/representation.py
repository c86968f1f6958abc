"""``rep_grad``: the rows are gradients of the representations, not of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmtl.engine.context import Batch
from fastmtl.engine.jacobian import BatchGradients, detached
from fastmtl.engine.losses import cut_features
from fastmtl.engine.methods.base import Method, forward
from fastmtl.engine.pullback import Representations
from fastmtl.engine.weights import Rows
from fastmtl.errors import UsageError
from fastmtl.support.profiling import part

__all__ = ["ForwardRepresentation", "Representation"]

# Representations, losses, predictions, and the cut representations that the losses start from.
Represented = tuple[Sequence[Tensor], Sequence[Tensor], Mapping[str, object], list[Tensor]]


class Representation(Method):
    """The heads are differentiated once; one VJP of the weighted gradients of the representations is left."""

    def prepare(self, batch: Batch) -> None:
        """Refuse decoders that use shared parameters; find out whose parameters are if their gradients are weighted."""
        model = self.problem.model
        if model.splits and not model.multi_input and self.structure.learn_cut(batch) and self.structure.tied:
            raise UsageError(f"rep_grad must be False here, as {self.structure.against_cut}.")
        if self.weighs_heads and not model.multi_input:
            self.structure.learn_owners(batch)

    def gradients_of(self, batch: Batch) -> BatchGradients:
        """Run the forward pass and the backward pass of the heads."""
        reps, losses, preds, cuts = self._represent(batch)
        with part("VJPs"):
            found, own = self.own_gradients(batch, losses, [[cut] for cut in cuts])
        grads = [torch.zeros_like(cut) if grad is None else grad for (grad,), cut in zip(found, cuts, strict=True)]
        if len({grad.shape[1:].numel() for grad in grads}) > 1:
            raise UsageError(
                "rep_grad needs representations of one size for all tasks, got "
                + ", ".join(f"{task}: {tuple(cut.shape)}" for task, cut in zip(batch.tasks, cuts, strict=True))
                + "."
            )
        rows: Rows = [[grad.reshape(len(grad), -1).sum(0)] for grad in grads]
        return BatchGradients(*detached(losses, preds), rows, own, Representations(reps, grads))

    def _represent(self, batch: Batch) -> Represented:
        tasks = batch.tasks
        with part("forward"):
            if self.problem.model.multi_input:
                apart = tuple(self.regions.single_rep(batch.of(task), task) for task in tasks)
                cuts = [_cut(rep) for rep in apart]
                losses, preds = [], {}
                for task, cut in zip(tasks, cuts, strict=True):
                    loss, preds[task] = self.regions.single_decode(cut, batch.labels[task], task)
                    losses.append(loss)
                return apart, losses, preds, cuts
            reps = self.regions.reps(batch.inputs, tasks)
            cuts = [_cut(rep) for rep in (reps if len(reps) > 1 else [reps[0] for _ in tasks])]
            scored, preds = self.regions.decode(cuts, batch.labels, tasks)
            return reps, scored, preds, cuts


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
        return reps, losses, preds, [model.rep_tasks[task] for task in batch.tasks]


def _cut(rep: Tensor) -> Tensor:
    (alias,) = cut_features((rep,))
    if not isinstance(alias, Tensor):
        raise UsageError(f"rep_grad needs a representation that is a tensor, got a {type(rep).__name__}.")
    return alias
