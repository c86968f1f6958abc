"""Trunk and heads differentiated separately: all heads at once, then one VJP per task through the trunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from fastmtl.engine.comm import Comm
from fastmtl.engine.context import Batch
from fastmtl.engine.cut import Structure
from fastmtl.engine.gradients import TaskGradients
from fastmtl.engine.graph import reach, root_nodes
from fastmtl.engine.jacobian import BatchGradients, Combine, detached
from fastmtl.engine.methods.base import MANY_TASKS, Method
from fastmtl.engine.methods.whole import Whole
from fastmtl.engine.model import Features
from fastmtl.engine.pullback import weighted
from fastmtl.engine.regions import Regions
from fastmtl.engine.trees import tensors_of
from fastmtl.engine.vjp import vjp, without_losses
from fastmtl.engine.weights import Rows, Weights
from fastmtl.support.profiling import part

__all__ = ["Heads", "Split"]

# Features, losses, predictions, cotangents of the features by task, and gradients of the task-specific parameters.
Heads = tuple[list[Tensor], Sequence[Tensor], Mapping[str, object], Rows, TaskGradients]


class Split(Method):
    """One batch for all tasks: the VJPs through the trunk run one after the other.

    A network whose trunk and heads are not separable is differentiated as a whole.
    """

    def __init__(self, structure: Structure, regions: Regions, comm: Comm, weighs_heads: bool) -> None:
        super().__init__(structure, regions, comm, weighs_heads)
        self.whole = Whole(structure, regions, comm, weighs_heads)

    def prepare(self, batch: Batch) -> None:
        """Find out whether the network can be cut, and the owners of parameters if their gradients are weighted."""
        if self.structure.learn(batch, cuts=True):
            self.regions.report(
                f"each task's backward pass runs through the whole network, as {self.structure.against_cut}"
            )
        self.possible = self.possible and not (self.only_if_cut and self.structure.against_cut is not None)
        if self.weighs_heads:
            self.structure.learn_owners(batch)

    def gradients_of(self, batch: Batch) -> BatchGradients:
        """Run the forward pass and all VJPs."""
        return self.split(batch) if self.structure.against_cut is None else self.whole.gradients_of(batch)

    def split(self, batch: Batch) -> BatchGradients:
        """Run the forward pass and all VJPs of a network that can be cut."""
        features, losses, preds, cotangents, task_grads = self.heads(self.trunk(batch), batch)
        with part("VJPs"):
            rows = self.rows_of(features, cotangents, batch)
        return BatchGradients(*detached(losses, preds), rows, task_grads, Combine())

    def combined(self, batch: Batch, weights: Weights) -> BatchGradients:
        """Run one VJP through the trunk, of the weighted sum of the tasks' cotangents."""
        self.prepare(batch)
        if self.structure.against_cut is not None:
            return self.whole.combined(batch, weights)
        features, losses, preds, cotangents, task_grads = self.heads(self.trunk(batch), batch)
        total = weighted(weights.shared, cotangents)
        with part("VJPs"):
            row = vjp(features, total, self.problem.shared_params, retain=False)
        return self.known(losses, preds, row, task_grads.weighted(weights.heads))

    def rows_of(self, features: Sequence[Tensor], cotangents: Rows, batch: Batch) -> Rows:
        """Return the VJPs through the trunk, one row per cotangent."""
        last, differentiate = len(cotangents) - 1, self.tables_of(features)
        places = self._places(features, cotangents)
        return [
            self.comm.row(features, cotangent, [], t < last, batch.final, differentiate, of_task)[0]
            for t, (cotangent, of_task) in enumerate(zip(cotangents, places, strict=True))
        ]

    def _places(self, features: Sequence[Tensor], cotangents: Rows) -> list[list[int] | None]:
        """Return the places of the shared parameters that each task reaches, by the features that it uses."""
        used = [[entry is not None for entry in cotangent] for cotangent in cotangents]
        plain = len(cotangents) < MANY_TASKS or torch.compiler.is_compiling()
        # A feature may be a parameter itself, which no graph shows.
        if plain or all(map(all, used)) or any(feature.grad_fn is None for feature in features):
            return [None] * len(cotangents)
        shared = self.problem.shared_params
        by_feature = reach(root_nodes(features)).places_of(shared, len(features))
        everything = range(len(shared))
        found: list[list[int] | None] = []
        for of_task in used:
            parts = [
                everything if part is None else part for part, uses in zip(by_feature, of_task, strict=True) if uses
            ]
            found.append(sorted(set().union(*parts)))
        return found

    def trunk(self, batch: Batch) -> Features:
        """Return the shared features."""
        with part("forward"):
            return cast(Features, self.regions.trunk(batch.inputs))

    def heads(self, features: Features, batch: Batch) -> Heads:
        """Run the heads and differentiate them; returns the tensors among the features."""
        with part("forward"):
            aliases = self.structure.aliases(features, batch.tasks)
            losses, preds = self.regions.heads(list(aliases.values()), batch.labels, batch.tasks)
        cut = [tensors_of(aliases[task]) for task in batch.tasks]
        with part("VJPs"):
            cotangents, task_grads = self.task_gradients(batch, losses, cut)
        outputs = tensors_of(features)
        return outputs, losses, preds, [without_losses(outputs, row) for row in cotangents], task_grads
