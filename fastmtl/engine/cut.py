"""What passes over the network tell of it: whose each parameter is, and whether trunk and heads can be cut apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastmtl.engine.context import Batch
from fastmtl.engine.graph import graph_nodes
from fastmtl.engine.losses import Problem, cut_features
from fastmtl.engine.model import Features, Tasks, keeping_buffers
from fastmtl.engine.trees import leaves
from fastmtl.errors import UsageError

__all__ = ["Structure"]


class Structure:
    """What is known of a network, once for all methods. Finding out leaves no trace in it.

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

    def learn_owners(self, batch: Batch) -> None:
        """Find out once, at the first batch with labels of all tasks, whose each task-specific parameter is.

        A parameter that no task reaches may be one that this batch's random numbers left out, so that it may serve
        several.
        """
        if self._owners_known or not all(task in batch.labels for task in self.problem.tasks):
            return
        self._owners_known = True
        with self._looking():
            reached = [self._reached_by(loss) for loss in self.problem.whole(batch.inputs, batch.labels)[0]]
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

    def learn_cut(self, batch: Batch) -> bool:
        """Find out, at the first batch of each task, whether features alone join trunk and heads; return if not so.

        Raises:
            UsageError: A decoder changes the features in place.
        """
        if self.against_cut is not None or self._cut_for.issuperset(batch.tasks):
            return False
        self._cut_for.update(batch.tasks)
        problem = self.problem
        with self._looking():
            features = problem.trunk(batch.inputs)
            losses = self._losses(features, batch)
            below, above = _parameters(leaves(features)), _parameters(losses)
        names = {param: name for name, param in problem.model.named_parameters(remove_duplicate=False)}
        self.tied = min((names[param] for param in above.intersection(problem.shared_params)), default=None)
        self.left_out = min((names[param] for param in below.intersection(problem.own_params)), default=None)
        return self.against_cut is not None

    def places(self, tasks: Tasks) -> list[int] | None:
        """Return for each task-specific parameter the place of its task among some tasks, if owners are known."""
        if self.owners is None:
            return None
        places = {self.problem.tasks.index(task): place for place, task in enumerate(tasks)}
        # A parameter of another task has no gradient, so its place does not matter.
        return [places.get(owner, 0) for owner in self.owners]

    def _losses(self, features: Features, batch: Batch) -> tuple[Tensor, ...]:
        try:
            aliases = [cut_features(features) for _ in batch.tasks]
            return self.problem.heads(aliases, batch.labels, batch.tasks)[0]
        except RuntimeError as cause:
            if "used in an in-place operation" not in str(cause):
                raise
            raise UsageError(
                "A decoder changes the shared features in place, which those of other tasks read too: let it make a "
                "new tensor of them, as with inplace=False."
            ) from cause

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Run the network in the block as in training, and put back its buffers and the random numbers."""
        model = self.problem.model
        devices = [model.device] if model.device.type == "cuda" else []
        with keeping_buffers(model), torch.enable_grad(), torch.random.fork_rng(devices):
            yield

    def _reached_by(self, loss: Tensor) -> list[bool]:
        own = self.problem.own_params
        if not own or not loss.requires_grad:
            return [False] * len(own)
        grads = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
        return [grad is not None for grad in grads]


def _parameters(outputs: Sequence[object]) -> set[nn.Parameter]:
    """Return the leaves of the graphs of those outputs that have one."""
    roots = [each.grad_fn for each in outputs if isinstance(each, Tensor) and each.grad_fn is not None]
    return {node.variable for node in graph_nodes(roots) if hasattr(node, "variable")}
