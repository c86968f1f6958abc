"""What passes over the network tell of it: whose each parameter is, what joins trunk, heads and losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmtl.engine.context import Batch
from fastmtl.engine.gradients import agree
from fastmtl.engine.graph import graph_nodes
from fastmtl.engine.hidden import VJP, may_hide, vjp_that_reaches_all
from fastmtl.engine.losses import Problem, cut_features
from fastmtl.engine.model import Features, Tasks, keeping_buffers
from fastmtl.engine.trees import leaves
from fastmtl.engine.vjp import vjp
from fastmtl.errors import UsageError

__all__ = ["Structure", "tensors_of"]


class Structure:
    """What is known of a network, once for all methods. Finding out leaves no trace in it.

    Args:
        problem: The network and its losses.

    Attributes:
        owners: The task of each task-specific parameter; None if that is not known, or some parameter serves several.
        tied: A shared parameter that decoders use too.
        left_out: A parameter of the shared network that is not among the shared ones.
        inseparable: Whether the gradients of trunk and heads are not those of the whole network.
        coupled: Whether some loss depends on the predictions of several tasks.
        by_backward: What computes VJPs where ``vjp`` misses parameters whose use the graph does not show.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.owners: list[int] | None = None
        self.tied: str | None = None
        self.left_out: str | None = None
        self.inseparable = False
        self.coupled = False
        self.by_backward: VJP | None = None
        self._owners_known = False
        self._cut_for: set[str] = set()
        self._joined_for: set[str] = set()

    def learn_owners(self, batch: Batch) -> None:
        """Find out once, at the first batch with labels of all tasks, whose each task-specific parameter is.

        A parameter that no task reaches may be one that this batch's random numbers left out, so that it may serve
        several.
        """
        if self._owners_known or not all(task in batch.labels for task in self.problem.tasks):
            return
        self._owners_known = True
        with self._looking():
            reached = [_leaves([loss]) for loss in self.problem.whole(batch.inputs, batch.labels)[0]]
        owners = [[t for t, params in enumerate(reached) if own in params] for own in self.problem.own_params]
        if all(len(tasks) == 1 for tasks in owners):
            self.owners = [task for (task,) in owners]

    @property
    def against_cut(self) -> str | None:
        """Return why trunk and heads cannot be differentiated apart, in a few words; None if nothing is known."""
        if self.tied is not None:
            return f"decoders use the shared parameter {self.tied}"
        if self.left_out is not None:
            return f"get_share_params() leaves out {self.left_out} of the shared network"
        if self.by_backward is not None:
            return "a function of the network runs backward passes of its own"
        if self.inseparable:
            return "a loss depends on more than what the decoders make of the shared features"
        return None

    def learn_cut(self, batch: Batch) -> bool:
        """Find out, at the first batch of each task, whether features alone join trunk and heads; return if not so.

        Raises:
            UsageError: A decoder changes the features in place, or a function of the network hides its parameters and
                cannot run backward for each task.
        """
        if self.against_cut is not None or self._cut_for.issuperset(batch.tasks):
            return False
        self._cut_for.update(batch.tasks)
        problem = self.problem
        with self._looking():
            features = problem.trunk(batch.inputs)
            aliases, losses = self._heads(features, batch)
            if not losses:
                self.inseparable = True
                return True
            self._couple(batch.tasks, losses, {task: tensors_of(alias) for task, alias in aliases.items()})
            below, above = _leaves(tensors_of(features)), _leaves(losses)
            hides = may_hide([*tensors_of(features), *losses])
        if hides:
            self.learn_joints(batch)
        self._joined_for.update(batch.tasks)
        names: dict[Tensor, str] = {
            param: name for name, param in problem.model.named_parameters(remove_duplicate=False)
        }
        self.tied = min((names[param] for param in above.intersection(problem.shared_params)), default=None)
        self.left_out = min((names[param] for param in below.intersection(problem.own_params)), default=None)
        if self.against_cut is None:
            self.inseparable = not self._adds_up(batch)
        return self.against_cut is not None

    def learn_decoders(self, batch: Batch) -> None:
        """Find out, at the first batch of each task, whether a loss needs decoders of tasks that are absent."""
        if not self._cut_for.issuperset(batch.tasks):
            self._cut_for.update(batch.tasks)
            with self._looking():
                aliases, losses = self._heads(self.problem.trunk(batch.inputs), batch)
                if losses:
                    self._couple(batch.tasks, losses, {task: tensors_of(alias) for task, alias in aliases.items()})

    def learn_joints(self, batch: Batch) -> bool:
        """Find out, at the first batch of each task, what ``vjp`` misses, and whether tasks' own inputs are joined.

        Returns:
            Whether something has come to light.

        Raises:
            UsageError: A function of the network hides its parameters and cannot run backward for each task.
        """
        problem = self.problem
        if self._joined_for.issuperset(batch.tasks):
            return False
        self._joined_for.update(batch.tasks)
        before = self.coupled, self.by_backward
        with self._looking():
            if not problem.model.multi_input:
                self._learn_hidden(problem.whole(batch.inputs, batch.labels, batch.tasks)[0])
            else:
                # One graph at a time.
                for task in batch.tasks:
                    loss = problem.single(batch.of(task), batch.labels[task], task)[0]
                    self._note(not self._marked(loss, task))
                    self._learn_hidden([loss])
        return before != (self.coupled, self.by_backward)

    def _learn_hidden(self, losses: Sequence[Tensor]) -> None:
        if self.by_backward is None and may_hide(losses):
            self.by_backward = vjp_that_reaches_all(losses, [*self.problem.shared_params, *self.problem.own_params])

    def _marked(self, loss: Tensor, task: str) -> bool:
        """Mark the graph of a task; return whether it had no mark of another's."""
        inner = [node for node in graph_nodes([loss.grad_fn]) if not hasattr(node, "variable")] if loss.grad_fn else []
        alone = all(node.metadata.setdefault(self, task) == task for node in inner)
        return alone

    def learn_coupling(self, tasks: Tasks, losses: Sequence[Tensor], starts: Mapping[str, Sequence[Tensor]]) -> None:
        """Find out, at the first losses of each task, whether one depends on what another task's starts from.

        Args:
            tasks: The tasks of the losses.
            losses: T losses.
            starts: The cut features, or representation, that the decoder of each task starts from.
        """
        if not self._cut_for.issuperset(tasks):
            self._cut_for.update(tasks)
            self._couple(tasks, losses, starts)

    def _couple(self, tasks: Tasks, losses: Sequence[Tensor], starts: Mapping[str, Sequence[Tensor]]) -> None:
        reached = {task: _leaves([loss]) for task, loss in zip(tasks, losses, strict=True)}
        pairs = ((reached[task], start) for task in tasks for other, start in starts.items() if other != task)
        self._note(any(not leaves_of.isdisjoint(start) for leaves_of, start in pairs))

    def _note(self, coupled: bool) -> None:
        self.coupled = self.coupled or coupled
        # What a loss reads of a task must be of this step.
        self.problem.decodes_all = self.problem.decodes_all or self.coupled

    def places(self, tasks: Tasks) -> list[int] | None:
        """Return for each task-specific parameter the place of its task among some tasks, if owners are known."""
        if self.owners is None:
            return None
        places = {self.problem.tasks.index(task): place for place, task in enumerate(tasks)}
        # A parameter of another task has no gradient, so its place does not matter.
        return [places.get(owner, 0) for owner in self.owners]

    def aliases(self, features: Features, tasks: Tasks) -> dict[str, Features]:
        """Return the cut features that each decoder starts from; those of all decoders, if losses are coupled."""
        if self.coupled:
            return dict.fromkeys(self.problem.decoded(tasks), cut_features(features))
        return {task: cut_features(features) for task in self.problem.decoded(tasks)}

    def _heads(self, features: Features, batch: Batch) -> tuple[dict[str, Features], tuple[Tensor, ...]]:
        """Run all decoders, each on features of its own."""
        problem = self.problem
        before, problem.decodes_all = problem.decodes_all, True
        try:
            aliases = {task: cut_features(features) for task in problem.tasks}
            return aliases, problem.heads(list(aliases.values()), batch.labels, batch.tasks)[0]
        except RuntimeError as cause:
            if "not have been used in the graph" in str(cause):
                # A loss takes a derivative with respect to what lies below the features.
                return {}, ()
            if "used in an in-place operation" not in str(cause):
                raise
            raise UsageError(
                "A decoder changes the shared features in place, which those of other tasks read too: let it make a "
                "new tensor of them, as with inplace=False."
            ) from cause
        finally:
            problem.decodes_all = before

    def _adds_up(self, batch: Batch) -> bool:
        """Return whether a weighted sum of the rows is, by way of the cut features, the gradient of that of losses."""
        problem, tasks = self.problem, batch.tasks
        # Other than ones: each row has to be that of its own task.
        weights = [1 + t / len(tasks) for t in range(len(tasks))]
        with self._looking(), self._in_one_piece():
            losses = problem.whole(batch.inputs, batch.labels, tasks)[0]
            want = vjp(
                losses,
                [loss.new_tensor(w) for loss, w in zip(losses, weights, strict=True)],
                problem.shared_params,
                False,
            )
        with self._looking():
            features = problem.trunk(batch.inputs)
            aliases = self.aliases(features, tasks)
            losses = problem.heads(list(aliases.values()), batch.labels, tasks)[0]
            rows = [
                vjp([loss], [None], tensors_of(aliases[task]), True) for task, loss in zip(tasks, losses, strict=True)
            ]
            total = [_weighted(column, weights) for column in zip(*rows, strict=True)]
            found = vjp(tensors_of(features), total, problem.shared_params, False)
        return agree(found, want)

    @contextmanager
    def _in_one_piece(self) -> Iterator[None]:
        """Leave the graph whole at the representation."""
        model = self.problem.model
        before, model.rep_grad = model.rep_grad, False
        try:
            yield
        finally:
            model.rep_grad = before

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Run the network in the block as in training, and put back its buffers and the random numbers."""
        model = self.problem.model
        devices = [model.device] if model.device.type == "cuda" else []
        with keeping_buffers(model), torch.enable_grad(), torch.random.fork_rng(devices):
            yield


def tensors_of(features: Features) -> list[Tensor]:
    """Leave out what a trunk hands on that is no tensor, such as inputs in a dictionary."""
    return [leaf for leaf in leaves(features) if isinstance(leaf, Tensor)]


def _leaves(outputs: Sequence[Tensor]) -> set[Tensor]:
    """Return the leaves of the graphs of those outputs that have one."""
    roots = [output.grad_fn for output in outputs if output.grad_fn is not None]
    return {node.variable for node in graph_nodes(roots) if hasattr(node, "variable")}


def _weighted(grads: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    present = [grad * weight for grad, weight in zip(grads, weights, strict=True) if grad is not None]
    return torch.stack(present).sum(0) if present else None
