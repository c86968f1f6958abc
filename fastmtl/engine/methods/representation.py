"""``rep_grad``: the rows are gradients of the representations, not of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fastmtl.engine.gradients import OwnGradients, summed
from fastmtl.engine.losses import Features, cut_features
from fastmtl.engine.methods.routes import Pass, Route, Rows, forward
from fastmtl.errors import UsageError
from fastmtl.trainer.log.profiling import part

__all__ = ["ForwardRepRoute", "RepPass", "RepRoute"]


class RepPass(Pass):
    """A pass whose rows are gradients of the representations; one VJP carries what they become to the parameters.

    Attributes:
        reps: T representations, the same tensor T times where the tasks share it.
        grads: T gradients of them.
    """

    def __init__(
        self,
        losses: Sequence[Tensor],
        preds: dict[str, Any],
        attached: Features,
        grads: Sequence[Tensor],
        own: OwnGradients,
    ) -> None:
        super().__init__(losses, preds, [[grad.reshape(len(grad), -1).sum(0)] for grad in grads])
        self.attached = attached
        self.grads = grads
        self.own = own
        self.others: list[RepPass] = []

    def absorb(self, other: Self) -> None:
        """Add up the rows, and keep the other batch's graph until the weights are known."""
        assert self.rows is not None
        assert other.rows is not None
        self.rows = summed(self.rows, other.rows)
        self.own.absorb(other.own)
        self.others.append(other)

    @property
    def reps(self) -> list[Tensor]:
        """Return the representations, detached."""
        reps = [rep.detach() for rep in self.attached]
        return reps if len(reps) == len(self.grads) else reps * len(self.grads)

    def write_heads(self, weights: Tensor | None) -> None:
        """Add the gradients kept from the backward pass of the heads."""
        self.own.write(weights)

    def write_shared(self, weights: Tensor, rows: Rows | None = None, groups: list[int] | None = None) -> None:
        """Send the weighted gradients of the representations down."""
        for each in (self, *self.others):
            each.send([weight.to(grad.dtype) * grad for weight, grad in zip(weights, each.grads, strict=True)])

    def send(self, grads: Sequence[Tensor]) -> None:
        """Send down to the shared parameters T gradients of the representations, or their sum where they share one."""
        fits = len(grads) == len(self.attached)
        with part("VJPs"):
            torch.autograd.backward(self.attached, list(grads) if fits else [torch.stack(list(grads)).sum(0)])


class RepRoute(Route):
    """``rep_grad``: the rows are gradients of the representations."""

    def prepare(self, inputs: Any, labels: Any) -> None:
        """Refuse decoders that use shared parameters; find out whose parameters are if their gradients are weighted."""
        model = self.problem.model
        if model.splits and not model.multi_input and self.structure.learn_cut(inputs, labels) and self.structure.tied:
            raise UsageError(f"rep_grad must be False here, as {self.structure.against_cut}.")
        if self.weighs_heads and not model.multi_input:
            self.structure.learn_owners(inputs, labels)

    def differentiate(self, inputs: Any, labels: Any) -> RepPass:
        """Run the forward pass and the backward pass of the heads."""
        reps, losses, preds, cuts = self._represent(inputs, labels)
        with part("VJPs"):
            found, own = self.own_gradients(losses, [[cut] for cut in cuts])
        grads = [torch.zeros_like(cut) if grad is None else grad for (grad,), cut in zip(found, cuts, strict=True)]
        sizes = {grad.shape[1:].numel() for grad in grads}
        if len(sizes) > 1:
            raise UsageError(
                "rep_grad needs representations of one size for all tasks, got "
                + ", ".join(f"{task}: {tuple(cut.shape)}" for task, cut in zip(self.problem.tasks, cuts, strict=True))
                + "."
            )
        return RepPass(losses, preds, reps, grads, own)

    def _represent(self, inputs: Any, labels: Any) -> tuple[Features, Sequence[Tensor], dict[str, Any], list[Tensor]]:
        """Return the representations, losses, predictions, and the cut representations the losses start from."""
        problem, tasks = self.problem, self.problem.tasks
        with part("forward"):
            if problem.model.multi_input:
                reps = tuple(self.regions.single_rep(inputs[task], task) for task in tasks)
                cuts = list(cut_features(reps))
                losses, preds = [], {}
                for task, cut in zip(tasks, cuts, strict=True):
                    loss, preds[task] = self.regions.single_decode(cut, labels[task], task)
                    losses.append(loss)
                return reps, losses, preds, cuts
            reps = self.regions.reps(inputs)
            if not all(isinstance(rep, Tensor) for rep in reps):
                raise UsageError(f"rep_grad needs a representation that is a tensor, got a {type(reps[0]).__name__}.")
            cuts = [cut_features(reps)[0] for _ in tasks] if len(reps) == 1 else list(cut_features(reps))
            scored, preds = self.regions.decode(cuts, labels)
            return reps, scored, preds, cuts


class ForwardRepRoute(RepRoute):
    """``rep_grad`` for an architecture that overrides ``forward`` as a whole and calls ``_prepare_rep`` in it."""

    def _represent(self, inputs: Any, labels: Any) -> tuple[Features, Sequence[Tensor], dict[str, Any], list[Tensor]]:
        model = self.problem.model
        losses, preds = forward(self.problem, self.regions, inputs, labels)
        if set(self.problem.tasks) - set(model.rep_tasks):
            raise UsageError(
                f"rep_grad must be False for {type(model).__mro__[1].__name__}: its forward passes no representation "
                "to _prepare_rep."
            )
        rep = model.rep
        reps = tuple(rep[task] for task in self.problem.tasks) if isinstance(rep, dict) else (rep,)
        return reps, losses, preds, [model.rep_tasks[task] for task in self.problem.tasks]
