"""What passes over the network tell of it: whose each parameter is, and whether trunk and heads can be cut apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.engine.buffers import keeping_buffers
from fastmtl.engine.graph import graph_nodes
from fastmtl.engine.losses import Problem, cut_features
from fastmtl.engine.trees import leaves
from fastmtl.errors import UsageError

__all__ = ["Structure"]


class Structure:
    """What is known of a network, once for all routes. Finding out leaves no trace in it.

    Args:
        problem: The network and its losses.

    Attributes:
        owners: The task of each task-specific parameter; None if that is not known, or some parameter serves several.
        tied: A shared parameter that decoders use too.
        left_out: A parameter of the shared network that is not among the shared ones.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.owners: list[int] | None = None
        self.tied: str | None = None
        self.left_out: str | None = None
        self._owners_known = False
        self._cut_for: set[str] = set()

    def learn_owners(self, inputs: Any, labels: Any) -> None:
        """Find out once, at the first batch with labels of all tasks, whose each task-specific parameter is.

        A parameter that no task reaches may be one that this batch's random numbers left out, so that it may serve
        several.
        """
        if self._owners_known or not all(task in labels for task in self.problem.model.task_name):
            return
        self._owners_known = True
        with self._looking(self.problem.model.task_name):
            reached = [self._reached_by(loss) for loss in self.problem.whole(inputs, labels)[0]]
        owners = [[t for t, reaches in enumerate(column) if reaches] for column in zip(*reached, strict=True)]
        if all(len(tasks) == 1 for tasks in owners):
            self.owners = [task for (task,) in owners]

    @property
    def against_cut(self) -> str | None:
        """Return why trunk and heads cannot be differentiated apart, in a few words; None if nothing is known."""
        if self.tied is not None:
            return f"decoders use the shared parameter {self.tied}"
        if self.left_out is not None:
            return f"get_share_params() leaves out {self.left_out} of the shared network"
        return None

    def learn_cut(self, inputs: Any, labels: Any) -> bool:
        """Find out, at the first batch of each task, whether features alone join trunk and heads; return if not so.

        Raises:
            UsageError: A decoder changes the features in place.
        """
        if self.against_cut is not None or self._cut_for.issuperset(self.problem.tasks):
            return False
        self._cut_for.update(self.problem.tasks)
        problem = self.problem
        with self._looking(problem.tasks):
            features = problem.trunk(inputs)
            losses = self._losses(features, labels)
            below, above = _parameters(leaves(features)), _parameters(losses)
        names = {param: name for name, param in problem.model.named_parameters(remove_duplicate=False)}
        self.tied = min((names[param] for param in above.intersection(problem.shared_params)), default=None)
        self.left_out = min((names[param] for param in below.intersection(problem.own_params)), default=None)
        return self.against_cut is not None

    def _losses(self, features: Any, labels: Any) -> tuple[Tensor, ...]:
        try:
            return self.problem.heads([cut_features(features) for _ in self.problem.tasks], labels)[0]
        except RuntimeError as cause:
            if "used in an in-place operation" not in str(cause):
                raise
            raise UsageError(
                "A decoder changes the shared features in place, which those of other tasks read too: let it make a "
                "new tensor of them, as with inplace=False."
            ) from cause

    @contextmanager
    def _looking(self, tasks: list[str]) -> Iterator[None]:
        """Run the network in the block as in training, and put back its buffers and the random numbers."""
        problem, model = self.problem, self.problem.model
        sampled, problem.tasks = problem.tasks, tasks
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with keeping_buffers(model), torch.enable_grad(), torch.random.fork_rng(devices):
                yield
        finally:
            problem.tasks = sampled

    def _reached_by(self, loss: Tensor) -> list[bool]:
        own = self.problem.own_params
        if not own or not loss.requires_grad:
            return [False] * len(own)
        grads = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
        return [grad is not None for grad in grads]


def _parameters(outputs: Sequence[Any]) -> set[nn.Parameter]:
    """Return the leaves of the graphs of those outputs that have one."""
    roots = [each.grad_fn for each in outputs if isinstance(each, Tensor) and each.grad_fn is not None]
    return {node.variable for node in graph_nodes(roots) if hasattr(node, "variable")}
