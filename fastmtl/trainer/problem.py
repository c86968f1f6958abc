"""The computations of a training step, as functions of inputs and labels that can be compiled one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastmtl.architecture import AbsArchitecture
from fastmtl.loss import AbsLoss

__all__ = ["Problem"]

Features = tuple[Tensor, ...]
Scored = tuple[tuple[Tensor, ...], dict[str, Any]]


class Problem:
    """A model, its losses and what is done to its predictions.

    Losses come as a tuple of T scalars, so that the backward pass of one does not walk through the heads of the others.

    Args:
        model: The architecture.
        losses: The loss of each task.
        process_preds: The trainer's hook, called with all predictions, or with one and its task if multi-input.
    """

    def __init__(
        self, model: AbsArchitecture, losses: Mapping[str, AbsLoss], process_preds: Callable[..., Any]
    ) -> None:
        self.model = model
        self.tasks = model.task_name
        self.losses = losses
        self.process_preds = process_preds
        self.shared_params = [param for param in model.get_share_params() if param.requires_grad]
        known = {id(param) for param in self.shared_params}
        self.own_params: list[nn.Parameter] = [
            param for param in model.parameters() if param.requires_grad and id(param) not in known
        ]

    def trunk(self, inputs: Any) -> Features:
        """Return the shared features."""
        return self.model.trunk(inputs)

    def heads(self, features: Sequence[Features], labels: Mapping[str, Any]) -> Scored:
        """Return losses and predictions from each task's own alias of the shared features."""
        reps = [self.model.branch(own, task) for own, task in zip(features, self.tasks, strict=True)]
        return self.decode(reps, labels)

    def reps(self, inputs: Any) -> Features:
        """Return the representation of every task, or a single one if the tasks share it."""
        features = self.model.trunk(inputs)
        reps = tuple(self.model.branch(features, task) for task in self.tasks)
        return reps[:1] if all(rep is reps[0] for rep in reps) else reps

    def decode(self, reps: Sequence[Tensor], labels: Mapping[str, Any]) -> Scored:
        """Return losses and predictions from each task's representation."""
        preds = {task: self.model.decoders[task](rep) for task, rep in zip(self.tasks, reps, strict=True)}
        return self._score(preds, labels)

    def whole(self, inputs: Any, labels: Mapping[str, Any]) -> Scored:
        """Return losses and predictions of one batch that all tasks share."""
        return self._score(self.model(inputs), labels)

    def single(self, inputs: Any, labels: Any, task: str) -> tuple[Tensor, Any]:
        """Return the loss and the prediction of one task on its own batch."""
        pred = self.process_preds(self.model(inputs, task)[task], task)
        return self.losses[task].compute_loss(pred, labels), pred

    def single_rep(self, inputs: Any, task: str) -> Tensor:
        """Return the representation of one task on its own batch."""
        return self.model.branch(self.model.trunk(inputs, task), task)

    def single_decode(self, rep: Tensor, labels: Any, task: str) -> tuple[Tensor, Any]:
        """Return the loss and the prediction of one task from its representation."""
        pred = self.process_preds(self.model.decoders[task](rep), task)
        return self.losses[task].compute_loss(pred, labels), pred

    def _score(self, preds: dict[str, Any], labels: Mapping[str, Any]) -> Scored:
        preds = self.process_preds(preds)
        return tuple(self.losses[task].compute_loss(preds[task], labels[task]) for task in self.tasks), preds
