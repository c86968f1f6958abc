"""The gradients of task-specific parameters: found during the backward passes, written once their weights are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.trainer.problem import Problem

__all__ = ["OwnGradients", "find_owners", "summed"]

Grads = Sequence[Tensor | None]


class OwnGradients:
    """Gradients of the task-specific parameters, task by task or as a sum over all tasks.

    Args:
        params: The task-specific parameters.
        parts: One gradient list per task, or a single one that holds the sum over the tasks.
        owners: For a single part: the task of each parameter, where every parameter belongs to one.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], parts: Sequence[Grads], owners: Sequence[int] | None = None
    ) -> None:
        self.params = params
        self.parts = parts
        self.owners = owners

    def absorb(self, other: OwnGradients) -> None:
        """Add the gradients of another batch."""
        self.parts = summed(self.parts, other.parts)

    def write(self, weights: Tensor | None) -> None:
        """Add the gradients, each task's weighted by ``weights`` (T,) if given, to ``.grad``."""
        by_task = None if weights is None else weights.unbind()
        if by_task is not None and len(self.parts) == 1 and len(by_task) > 1:
            assert self.owners is not None
            self._scale(self.parts[0], [by_task[owner] for owner in self.owners])
        elif by_task is not None:
            for part, weight in zip(self.parts, by_task, strict=True):
                self._scale(part, [weight] * len(self.params))
        for part in self.parts:
            for param, grad in zip(self.params, part, strict=True):
                if grad is not None:
                    param.grad = grad if param.grad is None else param.grad + grad

    @staticmethod
    def _scale(grads: Grads, weights: Sequence[Tensor]) -> None:
        for grad, weight in zip(grads, weights, strict=True):
            if grad is not None:
                grad.mul_(weight.to(grad.dtype))


def summed(rows: Sequence[Grads], others: Sequence[Grads]) -> list[list[Tensor | None]]:
    """Return the sums of gradients of two batches, None where neither has one."""
    return [
        [a if b is None else b if a is None else a + b for a, b in zip(mine, other, strict=True)]
        for mine, other in zip(rows, others, strict=True)
    ]


def find_owners(problem: Problem, inputs: Any, labels: Any) -> list[int] | None:
    """Return the task of each task-specific parameter, None if some parameter serves several.

    Runs the network once on a batch, in evaluation mode so that nothing it remembers changes.
    """
    model = problem.model
    modes = [(module, module.training) for module in model.modules()]
    sampled, problem.tasks = problem.tasks, model.task_name
    model.eval()
    try:
        with torch.enable_grad():
            losses, _ = problem.whole(inputs, labels)
            reached = [
                torch.autograd.grad(loss, problem.own_params, retain_graph=True, allow_unused=True) for loss in losses
            ]
    finally:
        problem.tasks = sampled
        for module, training in modes:
            module.training = training
    owners = []
    for column in zip(*reached, strict=True):
        tasks = [t for t, grad in enumerate(column) if grad is not None]
        if len(tasks) > 1:
            return None
        owners.append(tasks[0] if tasks else 0)
    return owners
