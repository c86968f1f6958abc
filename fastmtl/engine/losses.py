"""The forward computations of a training step, as functions that can be compiled one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from fastmtl.engine.halving import Halving, Pair, checked_halves
from fastmtl.engine.model import Features, Labels, MTLModel, Tasks
from fastmtl.engine.trees import detached_tree, leaves, map_tree
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss
from fastmtl.support.dtypes import HALF_TYPES

__all__ = ["LabelError", "Problem", "Scored", "cut_features"]

Result = TypeVar("Result")
Scored: TypeAlias = tuple[tuple[Tensor, ...], Mapping[str, object]]


class LabelError(UsageError):
    """Labels do not fit the loss of a ``task``."""

    def __init__(self, message: str, task: str) -> None:
        super().__init__(message)
        self.task = task


class Problem:
    """A model, its losses, and the hooks on predictions and batches.

    Losses are a tuple of T scalars, so that the backward pass of one does not run through the heads of the others.

    Args:
        model: The architecture.
        losses: The loss of each task.
        process_preds: The trainer's hook, called with all predictions, or with one and its task if multi-input.
        low_precision: The dtype of autocast, None without; losses are float32 either way.
        strategy_params: The parameters that belong to the strategy.
        decodes_all: Run all decoders in steps of some of the tasks too, as ``process_preds`` needs all predictions.
        split_batch: The trainer's hook that cuts inputs and labels of a batch in two halves; by rows if None.

    Attributes:
        tasks: All tasks.
        shared_params: The trainable parameters whose task gradients are balanced.
        task_params: The other trainable parameters of the network, those of single tasks.
        needs_graph: Whether some loss takes derivatives of predictions.
    """

    def __init__(
        self,
        model: MTLModel,
        losses: Mapping[str, AbsLoss],
        process_preds: Callable[..., Any],
        low_precision: torch.dtype | None = None,
        strategy_params: Sequence[nn.Parameter] = (),
        decodes_all: bool = False,
        split_batch: Callable[..., Any] | None = None,
    ) -> None:
        self.model = model
        self.tasks: Tasks = tuple(model.task_name)
        self.losses = losses
        self.process_preds = process_preds
        self.low_precision = low_precision
        self.strategy_params = strategy_params
        self.decodes_all = decodes_all
        self.needs_graph = False
        self._split_batch = split_batch or partial(Halving(), multi_input=model.multi_input)
        self.shared_params = [param for param in model.get_share_params() if param.requires_grad]
        known = {*self.shared_params, *strategy_params}
        self.task_params = [param for param in model.parameters() if param.requires_grad and param not in known]

    def halves(self, inputs: object, labels: Labels) -> tuple[Pair, Pair]:
        """Return two halves of a batch, each with its labels, for strategies that look ahead.

        Raises:
            UsageError: The batch cannot be cut, or ``split_batch`` returns no two halves.
        """
        known = {task: label for task, label in labels.items() if label is not None}
        first, second = checked_halves(self._split_batch(inputs, known), known, self.model.multi_input)
        return (first[0], {**dict.fromkeys(labels), **first[1]}), (second[0], {**dict.fromkeys(labels), **second[1]})

    def trained(self) -> list[nn.Parameter]:
        """Return all trainable parameters of the network, the shared ones first."""
        return [*self.shared_params, *self.task_params]

    def decoded(self, tasks: Tasks) -> Tasks:
        """Return the tasks whose decoders run in a step of these tasks."""
        return self.tasks if self.decodes_all else tasks

    def without_graph(self, run: Callable[[], Result]) -> Result:
        """Run a pass that will not be differentiated, without graph unless a loss takes derivatives."""
        if not self.needs_graph:
            try:
                with torch.no_grad():
                    return run()
            except RuntimeError as cause:
                if "does not require grad" not in str(cause):
                    raise
                self.needs_graph = True
        with torch.enable_grad():
            return cast(Result, detached_tree(run()))

    def trunk(self, inputs: object) -> Features:
        """Return the shared features."""
        with self._autocast():
            return self.model.trunk(inputs)

    def heads(self, features: Sequence[Features], labels: Labels, tasks: Tasks) -> Scored:
        """Return losses and predictions from aliases of the shared features, one per task of ``decoded(tasks)``."""
        with self._autocast():
            reps = [self.model.branch(alias, task) for alias, task in zip(features, self.decoded(tasks), strict=True)]
        return self.decode(reps, labels, tasks)

    def reps(self, inputs: object, tasks: Tasks) -> Features:
        """Return one representation per task of ``decoded(tasks)``, or a single one if they share it."""
        with self._autocast():
            features = self.model.trunk(inputs)
            reps = tuple(self.model.branch(features, task) for task in self.decoded(tasks))
        return reps[:1] if all(rep is reps[0] for rep in reps) else reps

    def decode(self, reps: Sequence[Tensor], labels: Labels, tasks: Tasks) -> Scored:
        """Return losses and predictions from the representation of each of ``decoded(tasks)``."""
        with self._autocast():
            decoders = self.model.decoders
            preds = {task: decoders[task](rep) for task, rep in zip(self.decoded(tasks), reps, strict=True)}
        return self._score(preds, labels, tasks)

    def whole(self, inputs: object, labels: Labels, tasks: Tasks | None = None) -> Scored:
        """Return losses and predictions of a batch that all tasks share; of all tasks if ``tasks`` is None."""
        tasks = self.tasks if tasks is None else tasks
        with self._autocast():
            decoded = self.decoded(tasks)
            if len(decoded) == len(self.tasks) or not self.model.splits:
                preds = self.model(inputs)
            else:
                # The decoders of absent tasks do not run: they may keep statistics.
                features = self.model.trunk(inputs)
                preds = {task: self.model.decoders[task](self.model.branch(features, task)) for task in decoded}
        return self._score(preds, labels, tasks)

    def single(self, inputs: object, labels: object, task: str) -> tuple[Tensor, object]:
        """Return the loss and the prediction of one task on its own batch."""
        with self._autocast():
            pred = self.model(inputs, task)[task]
        return self._score_one(pred, labels, task)

    def single_rep(self, inputs: object, task: str) -> Tensor:
        """Return the representation of one task on its own batch."""
        with self._autocast():
            return self.model.branch(self.model.trunk(inputs, task), task)

    def single_decode(self, rep: Tensor, labels: object, task: str) -> tuple[Tensor, object]:
        """Return the loss and the prediction of one task from its representation."""
        with self._autocast():
            pred = self.model.decoders[task](rep)
        return self._score_one(pred, labels, task)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.low_precision is None:
            return nullcontext()
        return torch.autocast(self.model.device.type, self.low_precision)

    def _score_one(self, pred: object, labels: object, task: str) -> tuple[Tensor, object]:
        pred = self.process_preds(self._full(pred), task)
        return self._loss(pred, labels, task), pred

    def _full(self, pred: object) -> object:
        """Return 16-bit predictions in float32."""

        def full(leaf: object) -> object:
            return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALF_TYPES else leaf

        return pred if self.low_precision is None else map_tree(full, pred)

    def _score(self, preds: Mapping[str, object], labels: Labels, tasks: Tasks) -> Scored:
        preds = self.process_preds({task: self._full(pred) for task, pred in preds.items()})
        labelled = [task for task in tasks if task in labels]
        missing = [task for task in labelled if not isinstance(preds, Mapping) or task not in preds]
        if missing:
            raise UsageError(
                f"process_preds must return a dictionary with a prediction for every task, got none for {missing[0]}."
            )
        return tuple(self._loss(preds[task], labels[task], task) for task in labelled), preds

    def _loss(self, pred: object, labels: object, task: str) -> Tensor:
        if labels is None:
            return _nothing(pred)
        try:
            loss = self.losses[task].compute_loss(pred, labels)
        except UsageError as cause:
            raise LabelError(f"Task {task}: {cause}", task).with_traceback(cause.__traceback__) from cause
        except IndexError as cause:
            label = re.fullmatch(r"Target (-?\d+) is out of bounds\.", str(cause))
            if label is None:
                raise
            raise LabelError(
                f"A label of {task} is {label[1]}, but its predictions have no such class: classes count from 0, and a "
                "missing label is marked by the ignore_index of the loss.",
                task,
            ) from cause
        if isinstance(loss, Tensor) and not loss.dim() and loss.dtype == torch.float32:
            return loss
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(
                f"compute_loss of {type(self.losses[task]).__name__}, the loss of {task}, must return a scalar tensor, "
                f"got {got}."
            )
        if loss.dtype == torch.float64 and all(leaf.dtype != torch.float64 for leaf in _floats(pred)):
            # Because the labels are float64.
            loss = loss.float()
        return loss.reshape(())


def cut_features(features: Features, always: bool = False) -> Features:
    """Return detached aliases of the features; those that depend on parameters, or ``always`` all, require grad."""

    def cut(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().requires_grad_(leaf.requires_grad or (always and leaf.is_floating_point()))

    return tuple(map_tree(cut, feature) for feature in features)


def _nothing(pred: object) -> Tensor:
    """Return a zero loss, with a graph, for a task whose labels only other processes or batches have."""
    # Not a multiple of the predictions, which may be infinite.
    return torch.stack([tensor.reshape(-1)[:0].sum() for tensor in _floats(pred)]).sum()


def _floats(pred: object) -> list[Tensor]:
    return [leaf for leaf in leaves(pred) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
