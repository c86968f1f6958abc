"""From the rows of a step that went layer by layer to the Gram matrix, and from weights to the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.engine.comm import Comm
from fastmtl.engine.gradients import set_grads, sum_present
from fastmtl.engine.jacobian import HasRows, Pullback
from fastmtl.engine.layerwise.uses import Use
from fastmtl.engine.layerwise.ways import Sketched, Way, gradient_of
from fastmtl.engine.model import Tasks
from fastmtl.engine.pullback import weighted
from fastmtl.engine.vjp import vjp_of_present
from fastmtl.engine.weights import Row, Rows, Weights
from fastmtl.support.profiling import part

__all__ = ["LayerwiseUpdate"]

# The cotangents of each use of a weight, for each task.
Kept = list[list[Tensor | None]]


@dataclass(kw_only=True, eq=False)
class LayerwiseUpdate(Pullback):
    """The rows have pieces in the place of some gradients, whose update is one gradient of the weighted cotangents.

    Attributes:
        params: The shared parameters.
        covered: Those with pieces in place of gradients.
        uses: The uses of those that this step uses.
        ways: Their ways.
        keeps: Whether the cotangents are kept.
        outputs: What was differentiated.
        cotangents: Its cotangents, by task.
        tasks: The tasks of the step.
        shapes: The shapes of the entries of a row.
        learn: Called with the exact rows and their Gram matrix (T, T).
        rows: T gradients, with pieces for what is covered.
        exact_rows: T gradients, where the Gram matrix is compared with theirs.
        kept: The cotangents of the outputs of each use of a weight, by task.
    """

    params: Sequence[Tensor]
    covered: Sequence[Tensor]
    uses: Mapping[Tensor, Sequence[Use]]
    ways: Mapping[Tensor, Way]
    keeps: bool
    outputs: Sequence[Tensor]
    cotangents: Rows
    tasks: Tasks
    shapes: Sequence[Sequence[int]]
    learn: Callable[[Rows, Tensor], None]
    rows: Rows = field(default_factory=list)
    exact_rows: Rows = field(default_factory=list)
    kept: dict[Tensor, Kept] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = {weight: [] for weight in self.uses}
        self.exact_gram = not any(isinstance(way, Sketched) for way in self.ways.values())
        self._parts = [self]

    def join(self, other: Pullback) -> None:
        """Take another graph of the step, whose rows follow this one's."""
        assert isinstance(other, LayerwiseUpdate)
        self._parts.append(other)
        self.exact_rows = [*self.exact_rows, *other.exact_rows]

    def collect(self, rows: Rows, comm: Comm, final: bool) -> Rows:
        """Return the rows summed over the processes, whole: pieces are small."""
        return comm.all_reduce_rows(rows, self.shapes, self.tasks) if comm.shards_rows else rows

    def gram(self, rows: Rows, groups: Sequence[int] | None, comm: Comm, shares: Tensor | None) -> Tensor:
        """Return the Gram matrix of the pieces and of what has none; the exact one where it is there to compare."""
        gram = self._gram(rows, groups, comm, shares)
        for place, param in enumerate(self.params):
            extra = self.ways[param].gram() if param in self.ways else None
            if extra is not None:
                (gram if groups is None else gram[groups[place]]).add_(extra)
        if self.exact_rows:
            exact_rows, self.exact_rows = self.exact_rows, []
            if comm.shards_rows:
                exact_rows = comm.all_reduce_rows(exact_rows, [param.shape for param in self.params], self.tasks)
            exact = self._gram(exact_rows, groups, comm, shares)
            whole = exact if groups is None else exact.sum(0)
            self.gram_error = _error(gram if groups is None else gram.sum(0), whole)
            self.exact_gram = True
            self.learn(exact_rows, whole)
            return exact
        return gram

    def _gram(self, rows: Rows, groups: Sequence[int] | None, comm: Comm, shares: Tensor | None) -> Tensor:
        return ops.gram(rows, groups) if comm.shards_rows else comm.gram(rows, groups, shares)

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Write the weighted sums of the gradients, and the gradients of the weighted cotangents."""
        shares = weights.shared.chunk(len(self._parts), dim=-1)
        grads = [part._gradients(share, weights.groups) for part, share in zip(self._parts, shares, strict=True)]
        set_grads(self.covered, [sum_present(column) for column in zip(*grads, strict=True)])
        done = set(self.covered)
        rows = [
            [None if param in done else entry for param, entry in zip(self.params, row, strict=True)]
            for row in source.rows
        ]
        comm.combination.write(rows, weights.shared, weights.groups)
        complete = [param for param in self.params if param not in done] if comm.shards_rows else []
        comm.all_reduce_grads(tasks, complete)

    def _gradients(self, weights: Tensor, groups: Sequence[int] | None) -> Row:
        """Return the gradients of what is covered, for the weights (T,) or, with groups, (L, T)."""
        if not self.keeps:
            total = weighted(weights, self.cotangents)
            with part("VJPs"):
                return vjp_of_present(self.outputs, total, self.covered, retain=False)
        group_of = groups and dict(zip(self.params, groups, strict=True))
        grads: Row = []
        for weight in self.covered:
            if weight not in self.uses:
                grads.append(None)
                continue
            of_tasks = weights if not group_of else weights[group_of[weight]]
            total = weighted(of_tasks, self.kept.pop(weight))
            with part("VJPs"):
                grad = gradient_of(self.uses[weight], total)
            grads.append(None if grad is None else grad.to(weight.dtype))
        return grads


def _error(gram: Tensor, exact: Tensor) -> Tensor:
    """Return the greatest difference of two Gram matrices, over the norms of the gradients that ``exact`` is of."""
    norms = exact.diagonal().clamp(min=0).sqrt()
    products = norms[:, None] * norms
    return ((gram - exact).abs() / products.where(products > 0, torch.inf)).max()
