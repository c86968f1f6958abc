"""The computations of a training step, as functions of inputs and labels that can be compiled one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.architecture import AbsArchitecture
from fastmtl.distributed.comm import Exchange
from fastmtl.engine.labels import labelled_entries
from fastmtl.engine.trees import leaves, map_tree
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss

__all__ = ["Features", "Problem", "cut_features"]

# Of tensors, or containers of them.
Features = tuple[Any, ...]
Scored = tuple[tuple[Tensor, ...], dict[str, Any]]


class Problem:
    """A model, its losses and what is done to its predictions.

    Losses come as a tuple of T scalars, so that the backward pass of one does not walk through the heads of the others.

    Args:
        model: The architecture.
        losses: The loss of each task.
        process_preds: The trainer's hook, called with all predictions, or with one and its task if multi-input.
        low_precision: The dtype the network computes in where that is safe (autocast); losses are always float32 then.
        strategy_params: The parameters of the model that are the strategy's.

    Attributes:
        shared_params: The trainable parameters whose task gradients are balanced.
        own_params: The other trainable ones of the network.
        factor: What all losses are multiplied by before they are differentiated, a scalar tensor; None for 1.
        share: (T,) share of this batch, and this process, in a step, by which losses are multiplied too; None for 1.
    """

    def __init__(
        self,
        model: AbsArchitecture,
        losses: Mapping[str, AbsLoss],
        process_preds: Callable[..., Any],
        low_precision: torch.dtype | None = None,
        strategy_params: Sequence[nn.Parameter] = (),
    ) -> None:
        self.model = model
        self.tasks = model.task_name
        self.losses = losses
        self.process_preds = process_preds
        self.low_precision = low_precision
        self.factor: Tensor | None = None
        self.share: Tensor | None = None
        self.strategy_params = strategy_params
        self.shared_params = [param for param in model.get_share_params() if param.requires_grad]
        known = {*self.shared_params, *strategy_params}
        self.own_params: list[nn.Parameter] = [
            param for param in model.parameters() if param.requires_grad and param not in known
        ]

    def factors(self) -> Tensor | None:
        """Return what the losses are multiplied by: a scalar or (T,) tensor, None for 1."""
        if self.factor is None or self.share is None:
            return self.share if self.factor is None else self.factor
        return self.factor * self.share

    def shares(self, labels: Sequence[Mapping[str, Any]], exchange: Exchange | None) -> Tensor:
        """Return the share (n, T) of each of n batches in the labels of all of them, in all processes.

        Losses are means over the labels that are there; multiplied by these shares they add up to the mean over all.

        Args:
            labels: The labels by task, batch by batch.
            exchange: The other processes, if there are any.
        """
        device = self.model.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        counts = torch.stack(
            [
                torch.stack(
                    [_scalar(labelled_entries(self.losses[task], each[task]), dtype, device) for task in self.tasks]
                )
                for each in labels
            ]
        )
        total = counts.sum(0)
        return counts / (total if exchange is None else exchange.peers.sum_(total)).clamp(min=1)

    def mean_losses(self, losses: Tensor, labels: Sequence[Mapping[str, Any]], exchange: Exchange | None) -> Tensor:
        """Return the mean (T,) of batches' losses (n, T), those of all processes, by how many labels each has."""
        shares = self.shares(labels, exchange)
        if exchange is not None:
            shares = exchange.peers.sum_(shares)
        return (losses * shares).sum(0).to(losses.dtype)

    def trunk(self, inputs: Any) -> Features:
        """Return the shared features."""
        with self._autocast():
            return self.model.trunk(inputs)

    def heads(self, features: Sequence[Features], labels: Mapping[str, Any]) -> Scored:
        """Return losses and predictions from each task's own alias of the shared features."""
        with self._autocast():
            reps = [self.model.branch(own, task) for own, task in zip(features, self.tasks, strict=True)]
        return self.decode(reps, labels)

    def reps(self, inputs: Any) -> Features:
        """Return the representation of every task, or a single one if the tasks share it."""
        with self._autocast():
            features = self.model.trunk(inputs)
            reps = tuple(self.model.branch(features, task) for task in self.tasks)
        return reps[:1] if all(rep is reps[0] for rep in reps) else reps

    def decode(self, reps: Sequence[Tensor], labels: Mapping[str, Any]) -> Scored:
        """Return losses and predictions from each task's representation."""
        with self._autocast():
            preds = {task: self.model.decoders[task](rep) for task, rep in zip(self.tasks, reps, strict=True)}
        return self._score(preds, labels)

    def whole(self, inputs: Any, labels: Mapping[str, Any]) -> Scored:
        """Return losses and predictions of one batch that all tasks share."""
        with self._autocast():
            if len(self.tasks) == len(self.model.task_name) or not self.model.splits:
                preds = self.model(inputs)
            else:
                # The decoders of absent tasks do not run: they may have statistics of their own.
                features = self.model.trunk(inputs)
                preds = {task: self.model.decoders[task](self.model.branch(features, task)) for task in self.tasks}
        return self._score(preds, labels)

    def single(self, inputs: Any, labels: Any, task: str) -> tuple[Tensor, Any]:
        """Return the loss and the prediction of one task on its own batch."""
        with self._autocast():
            pred = self.model(inputs, task)[task]
        return self._score_one(pred, labels, task)

    def single_rep(self, inputs: Any, task: str) -> Tensor:
        """Return the representation of one task on its own batch."""
        with self._autocast():
            return self.model.branch(self.model.trunk(inputs, task), task)

    def single_decode(self, rep: Tensor, labels: Any, task: str) -> tuple[Tensor, Any]:
        """Return the loss and the prediction of one task from its representation."""
        with self._autocast():
            pred = self.model.decoders[task](rep)
        return self._score_one(pred, labels, task)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.low_precision is None:
            return nullcontext()
        return torch.autocast(self.model.device.type, self.low_precision)

    def _score_one(self, pred: Any, labels: Any, task: str) -> tuple[Tensor, Any]:
        pred = self.process_preds(self._full(pred), task)
        return self._loss(pred, labels, task), pred

    def _full(self, pred: Any) -> Any:
        """Return predictions in float32 where the network's are not."""

        def full(leaf: Any) -> Any:
            return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16) else leaf

        return pred if self.low_precision is None else map_tree(full, pred)

    def _score(self, preds: dict[str, Any], labels: Mapping[str, Any]) -> Scored:
        preds = self.process_preds({task: self._full(pred) for task, pred in preds.items()})
        tasks = [task for task in self.tasks if task in labels]
        return tuple(self._loss(preds[task], labels[task], task) for task in tasks), preds

    def _loss(self, pred: Any, labels: Any, task: str) -> Tensor:
        if labels is None:
            return _nothing(pred)
        loss = self.losses[task].compute_loss(pred, labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(
                f"compute_loss of {type(self.losses[task]).__name__}, the loss of {task}, must return a scalar tensor, "
                f"got {got}."
            )
        if loss.dtype == torch.float64 and all(leaf.dtype != torch.float64 for leaf in _floats(pred)):
            # The labels were.
            loss = loss.float()
        return loss.reshape(())


def cut_features(features: Features) -> Features:
    """Return aliases of the features that start a graph of their own, at those that depend on parameters."""

    def cut(leaf: Any) -> Any:
        return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    return tuple(map_tree(cut, feature) for feature in features)


def _nothing(pred: Any) -> Tensor:
    """Return a loss of zero for labels that only other processes or batches have, with a graph like theirs."""
    # Not a multiple of the predictions, which may be infinite.
    return torch.stack([tensor.reshape(-1)[:0].sum() for tensor in _floats(pred)]).sum()


def _floats(pred: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(pred) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _scalar(count: int | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a tensor; it is filled in on the device, as a copy from the host would wait."""
    return count.to(device, dtype) if isinstance(count, Tensor) else torch.full((), count, dtype=dtype, device=device)
