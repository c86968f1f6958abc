"""What passes over the network show: which task owns a parameter, and whether trunk and heads are separable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch
from fastmtl.engine.gradients import agree, are_finite, sum_present
from fastmtl.engine.graph import inner_nodes, number_now, reached_leaves
from fastmtl.engine.hidden import VJP, may_hide, vjp_that_reaches_all
from fastmtl.engine.losses import Problem, cut_features
from fastmtl.engine.model import Features, Tasks
from fastmtl.engine.side_effects import in_one_piece, without_side_effects
from fastmtl.engine.trees import tensors_of
from fastmtl.engine.vjp import vjp
from fastmtl.engine.weights import Row
from fastmtl.errors import UsageError
from fastmtl.support.dtypes import HALF_TYPES

__all__ = ["Structure"]


_MORE = "a loss depends on more than what the decoders make of the shared features"


class _Pass(NamedTuple):
    """Losses (T,) of a pass, and the gradients of their weighted sum for the shared parameters."""

    losses: Tensor
    grads: Row


class Structure:
    """What is known of a network, once for all methods. The passes that find it out have no side effects.

    All processes come to the same conclusions.

    Attributes:
        owners: The task of each task-specific parameter; None if that is not known, or some parameter serves several.
        against_cut: Why trunk and heads cannot be differentiated separately, in a few words; None if nothing is known.
        leaves_out: Whether the reason is that ``get_share_params`` leaves out parameters of the trunk.
        coupled: Whether some loss depends on the predictions of several tasks.
        by_backward: Computes VJPs where ``vjp`` misses parameters whose use the graph does not show.
    """

    def __init__(self, problem: Problem, comm: Comm) -> None:
        self.problem = problem
        self.comm = comm
        self.owners: list[int] | None = None
        self.against_cut: str | None = None
        self.leaves_out = False
        self.coupled = False
        self.by_backward: VJP | None = None
        self._owners_known = False
        # The tasks whose losses have been examined, and the epoch in which that was last.
        self._seen: set[str] = set()
        self._decoders_for: set[str] = set()
        self._epoch: object = None

    def learn_owners(self, batch: Batch) -> None:
        """Find out once, at the first batch with labels of all tasks, which task owns each parameter.

        A parameter that no loss reaches, as by chance in this batch, may belong to several tasks.
        """
        problem = self.problem
        if self._owners_known or any(batch.labels.get(task) is None for task in problem.tasks):
            return
        self._owners_known = True
        with without_side_effects(problem):
            reached = [reached_leaves([loss]) for loss in problem.whole(batch.inputs, batch.labels)[0]]
        owners = [[t for t, params in enumerate(reached) if param in params] for param in problem.task_params]
        if all(len(tasks) == 1 for tasks in owners):
            self.owners = [task for (task,) in owners]

    def learn(self, batch: Batch, cuts: bool) -> bool:
        """Examine the network at the first labels of each task, and again in every epoch.

        ``cuts`` says whether trunk and heads are to be differentiated separately; returns whether this batch has shown
        that they cannot.

        Raises:
            UsageError: A decoder changes the features in place, a function of the network hides its parameters and
                cannot run backward for each task, or a loss depends on a graph that is freed.
        """
        epoch, before = getattr(self.problem.model, "epoch", None), self.against_cut
        known, is_new = self._seen.issuperset(batch.tasks), epoch != self._epoch
        self._epoch = epoch
        if known:
            if is_new and cuts:
                self._recheck(batch)
            return self.against_cut is not None and before is None
        finite = (
            self._learn_multi_input(batch) if self.problem.model.multi_input else self._learn_shared_input(batch, cuts)
        )
        (proven,) = self.comm.any([finite])
        self._seen.update(self._labelled(batch) if proven else ())
        return self.against_cut is not None and before is None

    def learn_decoders(self, batch: Batch) -> None:
        """Find out, at the first labels of each task, whether a loss needs decoders of tasks that are absent."""
        problem = self.problem
        if len(batch.tasks) == len(problem.tasks) or not problem.model.splits or problem.model.multi_input:
            return
        if not self._decoders_for.issuperset(batch.tasks):
            self._decoders_for.update(self._labelled(batch))
            with without_side_effects(problem):
                self._heads(problem.trunk(batch.inputs), batch)
            self._note_coupling(*self.comm.any([self.coupled]))

    def learn_coupling(self, tasks: Tasks, losses: Sequence[Tensor], starts: Mapping[str, Sequence[Tensor]]) -> None:
        """Find out whether one of the T losses depends on the input of another task's decoder.

        ``starts`` holds the cut features, or representation, that the decoder of each task reads.
        """
        reached = {task: reached_leaves([loss]) for task, loss in zip(tasks, losses, strict=True)}
        pairs = ((reached[task], start) for task in tasks for other, start in starts.items() if other != task)
        self._note_coupling(any(not leaves_of.isdisjoint(start) for leaves_of, start in pairs))

    def places(self, tasks: Tasks) -> list[int] | None:
        """Return for each task-specific parameter the index of its task in ``tasks``, None if owners are unknown."""
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

    def _labelled(self, batch: Batch) -> list[str]:
        """Return the tasks of a batch that have labels here or in another process."""
        tasks = batch.tasks
        flags = self.comm.any([batch.labels.get(task) is not None for task in tasks])
        return [task for task, has_labels in zip(tasks, flags, strict=True) if has_labels]

    def _note_coupling(self, coupled: bool) -> None:
        self.coupled = self.coupled or coupled
        # A loss must read predictions of this step.
        self.problem.decodes_all = self.problem.decodes_all or self.coupled

    def _learn_shared_input(self, batch: Batch, cuts: bool) -> bool:
        """Examine a batch that all tasks share; return whether its gradients were finite."""
        parts, whole = (self._parts(batch, True) if cuts else None), self._whole(batch, True, cuts)
        (hides,) = self.comm.any([whole is None])
        if hides:
            self._learn_hidden([batch])
        if hides and cuts and self.by_backward is None:
            parts, whole = self._parts(batch, False), self._whole(batch, False, cuts)
        if cuts:
            self._compare(batch, whole, parts)
        return whole is None or are_finite(whole.grads)

    def _recheck(self, batch: Batch) -> None:
        """Examine the heads again, as a loss may have changed."""
        with without_side_effects(self.problem):
            self._look_at_heads(self.problem.trunk(batch.inputs), batch)
        self._agree(self.against_cut is not None)

    def _agree(self, stands: bool) -> bool:
        """Come to the same conclusions in all processes; return whether the network cannot be cut in one of them."""
        coupled, stands = self.comm.any([self.coupled, stands])
        self._note_coupling(coupled)
        if stands:
            self.against_cut = self.against_cut or "another process has found that they cannot be separated"
        return stands

    def _compare(self, batch: Batch, whole: _Pass | None, parts: _Pass | None) -> None:
        """Compare the gradients of trunk and heads, differentiated separately, with those of the whole network."""
        if not self._agree(parts is None):
            assert whole is not None
            assert parts is not None
            (differs,) = self.comm.any([not self._same(whole, parts)])
            # A network or loss whose numbers differ from pass to pass proves nothing.
            again = self._whole(batch, False, True) if differs else None
            (proven,) = self.comm.any([again is not None and self._same(whole, again)])
            if proven:
                self.against_cut = _MORE

    def _learn_multi_input(self, batch: Batch) -> bool:
        """Examine inputs per task, one graph at a time."""
        problem, first = self.problem, number_now()
        coupled = hides = False
        for task in batch.tasks:
            start = number_now()
            with without_side_effects(problem):
                loss = problem.single(batch.of(task), batch.labels[task], task)[0]
                oldest = min((node._sequence_nr() for node in inner_nodes([loss])), default=start)
                _refuse_freed_graph(task, oldest < first)
                coupled, hides = coupled or oldest < start, hides or may_hide([loss])
                del loss
        coupled, hides = self.comm.any([coupled, hides])
        self._note_coupling(coupled)
        if self.coupled and len(batch.tasks) < len(problem.tasks):
            _refuse_freed_graph(batch.tasks[0], True)
        if hides:
            self._learn_hidden([replace(batch, tasks=(task,)) for task in batch.tasks])
        return True

    def _learn_hidden(self, batches: Sequence[Batch]) -> None:
        """Find out whether ``vjp`` reaches all parameters."""
        problem = self.problem
        params = [*problem.shared_params, *problem.task_params]
        for batch in batches:
            with without_side_effects(problem):
                if problem.model.multi_input:
                    (task,) = batch.tasks
                    losses = [problem.single(batch.of(task), batch.labels[task], task)[0]]
                else:
                    losses = list(problem.whole(batch.inputs, batch.labels, batch.tasks)[0])
                misses, by_backward = vjp_that_reaches_all(losses, params, problem.model.device)
            if any(self.comm.any([misses])):
                self.by_backward = by_backward
                self.against_cut = self.against_cut or "a function of the network runs backward passes of its own"

    def _whole(self, batch: Batch, stops_if_hidden: bool, differentiates: bool) -> _Pass | None:
        """Differentiate the network as a whole; None if it ``stops_if_hidden`` and the graph may hide parameters."""
        problem, start = self.problem, number_now()
        with without_side_effects(problem), in_one_piece(problem.model):
            losses = problem.whole(batch.inputs, batch.labels, batch.tasks)[0]
            for task, loss in zip(batch.tasks, losses, strict=True):
                _refuse_freed_graph(task, any(node._sequence_nr() < start for node in inner_nodes([loss])))
            if stops_if_hidden and may_hide(losses):
                return None
            if not differentiates:
                return _Pass(_stacked(losses), [])
            seeds = [loss.new_tensor(weight) for loss, weight in zip(losses, _weights(losses), strict=True)]
            return _Pass(_stacked(losses), vjp(losses, seeds, problem.shared_params, False))

    def _parts(self, batch: Batch, stops_if_hidden: bool) -> _Pass | None:
        """Differentiate trunk and heads separately; None if they cannot be, or as `_whole` does."""
        problem, tasks = self.problem, batch.tasks
        with without_side_effects(problem):
            features = problem.trunk(batch.inputs)
            passed = self._look_at_heads(features, batch)
            if passed is None or self.against_cut is not None:
                return None
            aliases, losses = passed
            if stops_if_hidden and may_hide([*tensors_of(features), *losses]):
                return None
            rows = []
            for task, loss in zip(tasks, losses, strict=True):
                starts = aliases.values() if self.coupled else [aliases[task]]
                grads = [vjp([loss], [None], tensors_of(start), True) for start in starts]
                rows.append([sum_present(column) for column in zip(*grads, strict=True)])
            weights = _weights(losses)
            total = [
                sum_present([None if grad is None else grad * w for grad, w in zip(column, weights, strict=True)])
                for column in zip(*rows, strict=True)
            ]
            return _Pass(_stacked(losses), vjp(tensors_of(features), total, problem.shared_params, False))

    def _look_at_heads(self, features: Features, batch: Batch) -> tuple[dict[str, Features], tuple[Tensor, ...]] | None:
        """Run the heads; find the parameters that their graphs, and that of the trunk, reach."""
        problem = self.problem
        passed = self._heads(features, batch)
        if passed is None:
            problem.decodes_all = True
            self.against_cut = self.against_cut or _MORE
        if passed is None or self.against_cut is not None:
            return passed
        below, above = reached_leaves(tensors_of(features)), reached_leaves(passed[1])
        names: dict[Tensor, str] = {}
        for name, param in problem.model.named_parameters(remove_duplicate=False):
            # By the trunk's name, if it has one.
            if param not in names or names[param].startswith(("decoders.", "loss")):
                names[param] = name
        tied = min((names[param] for param in problem.shared_params if param in above), default=None)
        left_out = min((names[param] for param in problem.task_params if param in below), default=None)
        if tied is not None:
            self.against_cut = f"decoders or losses use the shared parameter {tied}"
        elif left_out is not None:
            self.leaves_out = True
            self.against_cut = f"get_share_params() leaves out {left_out} of the shared network"
        return passed

    def _heads(self, features: Features, batch: Batch) -> tuple[dict[str, Features], tuple[Tensor, ...]] | None:
        """Run all decoders, each on its own aliases of the features; None if the losses cannot be computed so."""
        problem = self.problem
        before, problem.decodes_all = problem.decodes_all, True
        aliases = {task: cut_features(features, always=True) for task in problem.tasks}
        try:
            losses = problem.heads(list(aliases.values()), batch.labels, batch.tasks)[0]
        except UsageError:
            raise
        except Exception as cause:
            if "used in an in-place operation" in str(cause):
                raise UsageError(
                    "A decoder changes the shared features in place, which those of other tasks read too: let it make "
                    "a new tensor of them, as with inplace=False."
                ) from cause
            # If the whole network cannot run either, it raises the error.
            return None
        finally:
            problem.decodes_all = before
        self.learn_coupling(batch.tasks, losses, {task: tensors_of(alias) for task, alias in aliases.items()})
        return aliases, losses

    def _same(self, one: _Pass, other: _Pass) -> bool:
        """Return whether two passes have the same losses and gradients but for rounding."""
        halved = self.problem.low_precision is not None or any(
            param.dtype in HALF_TYPES for param in self.problem.shared_params
        )
        known = one.losses.isfinite() & other.losses.isfinite()
        near = torch.isclose(one.losses, other.losses, rtol=5e-2 if halved else 1e-4, atol=1e-6)
        return bool((near | ~known).all()) and agree(other.grads, one.grads, halved)


def _refuse_freed_graph(task: str, gone: bool) -> None:
    if gone:
        raise UsageError(
            f"The loss of {task} depends on tensors of an earlier pass over the network, whose graph is freed: with "
            "inputs per task this needs all tasks in every step (tasks_per_step=None)."
        )


def _weights(losses: Sequence[Tensor]) -> list[float]:
    """Return weights that differ, so that rows of the wrong tasks are noticed."""
    return [1 + t / len(losses) for t in range(len(losses))]


def _stacked(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([loss.detach().double() for loss in losses]) if losses else torch.zeros(0)
