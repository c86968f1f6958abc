"""Groups of parameters one after the other: each is differentiated, weighed and written before the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.engine.blocks import Blocks, Segment, find_blocks
from fastmtl.engine.comm import Combination, Comm
from fastmtl.engine.context import Batch
from fastmtl.engine.cut import Structure
from fastmtl.engine.gradients import aligned
from fastmtl.engine.jacobian import BatchGradients, Combine, Decide, HasRows, Jacobian, Pullback, detached
from fastmtl.engine.methods.split import Split
from fastmtl.engine.methods.traced import has_gradient_hooks
from fastmtl.engine.model import Tasks
from fastmtl.engine.regions import Regions
from fastmtl.engine.side_effects import without_side_effects
from fastmtl.engine.trees import tensors_of
from fastmtl.engine.vjp import vjp
from fastmtl.engine.weights import Row, Rows, Weights, joined
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.profiling import part

__all__ = ["Blockwise"]


class Blockwise(Split):
    """The cotangents of all tasks go down the trunk together, so that at most one block's T gradients are alive.

    Args:
        structure: What is known of the network.
        regions: The network's functions.
        comm: The other processes.
        weighs_heads: Whether the gradients of the task-specific parameters are weighted.
        groups: The group of each shared parameter, 0 .. L-1.
        count: The number L of groups.
    """

    only_if_cut = True

    def __init__(
        self, structure: Structure, regions: Regions, comm: Comm, weighs_heads: bool, groups: Sequence[int], count: int
    ) -> None:
        super().__init__(structure, regions, comm, weighs_heads)
        self.groups = groups
        self.count = count
        self.blocks: Blocks | None = None
        self._combinations: list[Combination] = []
        self._told = False

    def prepare(self, batch: Batch) -> None:
        """Find out, once, where the trunk can be cut."""
        super().prepare(batch)
        if self.blocks is not None or not self.possible or self.structure.against_cut is not None:
            return
        problem = self.problem
        with without_side_effects(problem):
            self.blocks = find_blocks(
                lambda: tensors_of(problem.trunk(batch.inputs)),
                problem.model.modules(),
                problem.shared_params,
                self.groups,
            )
        if self.blocks is None:
            self.possible = False
            self.regions.report("vjps: all groups at once, as the network is no chain of them")
            return
        params = problem.shared_params
        self._combinations = [Combination([params[k] for k in block]) for block in self.blocks.blocks]
        largest = max(sum(params[k].numel() for k in block) for block in self.blocks.blocks)
        whole = sum(param.numel() for param in params)
        self.regions.report(
            f"vjps: {len(self.blocks.blocks)} blocks one after the other, the largest has {largest / whole:.0%} of the "
            "shared parameters"
        )

    def split(self, batch: Batch) -> BatchGradients:
        """Run the forward pass and the heads' VJPs; those through the trunk follow when weights are asked for."""
        if self.blocks is None:
            return super().split(batch)
        with self.blocks.watching() as outputs:
            whole = self.trunk(batch)
        features, losses, preds, cotangents, task_grads = self.heads(whole, batch)
        segments = self.blocks.segments(features, outputs, self.problem.shared_params)
        against = "in a step in which the network is no chain of them" if segments is None else None
        if has_gradient_hooks(self.problem.model):
            against = "as gradients have hooks, which would run twice"
        elif self.tables_of(features) is not None:
            against = "as the gradients of embedding tables have touched rows only"
        if segments is None or against is not None:
            if not self._told:
                self.regions.report(f"vjps: all groups at once {against}")
            self._told = True
            rows = self.rows_of(features, cotangents, batch)
            return BatchGradients(*detached(losses, preds), rows, task_grads, Combine())
        passes = _Passes(segments, cotangents, self.groups, self.count, self.problem.shared_params, self._combinations)
        return BatchGradients(*detached(losses, preds), [], task_grads, passes)


class _Passes(Pullback):
    """The backward passes of a chain of segments, each followed by the solve and the update of its groups.

    Args:
        segments: The segments of the graph.
        cotangents: The T cotangents of the features.
        groups: The group of each parameter, 0 .. L-1.
        count: The number L of groups.
        params: The shared parameters.
        combinations: Writes the update of each segment.
    """

    limits_by_gram = False

    def __init__(
        self,
        segments: Sequence[Segment],
        cotangents: Rows,
        groups: Sequence[int],
        count: int,
        params: Sequence[Tensor],
        combinations: Sequence[Combination],
    ) -> None:
        self._segments = segments
        self._cotangents = cotangents
        self._groups = groups
        self._count = count
        self._params = params
        self._combinations = combinations
        self._done = False

    def decided(self, source: Jacobian, groups: Sequence[int] | None, decide: Decide) -> Weights:
        """Write the update of each segment with the weights that ``decide`` returns for its groups."""
        places, parts = [], []
        for of_segment, local, rows, combination in self._rows():
            gram = source.scaling.gram(self._gram(rows, local))
            weights = decide(gram, of_segment)
            combination.write(rows, weights.shared, local)
            places += of_segment
            parts.append(weights)
            del rows
        self._done = True
        return joined(parts, places)

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Write the update with weights that were held, unless it is written."""
        if not self._done:
            for of_segment, local, rows, combination in self._rows():
                combination.write(rows, torch.stack([weights.shared[place] for place in of_segment]), local)
                del rows
        self._done = True
        comm.all_reduce_grads(tasks)

    def _rows(self) -> Iterator[tuple[list[int], list[int], Rows, Combination]]:
        """Yield for each segment its groups, the group among them of each parameter, T rows and what writes it."""
        cotangents: list[Row | None] = list(self._cotangents)
        self._cotangents = []
        # Those whose parameters are all frozen are in none, and come last.
        idle = sorted(set(range(self._count)) - set(self._groups))
        for segment, combination in zip(self._segments, self._combinations, strict=True):
            of_segment = sorted({self._groups[k] for k in segment.block})
            of_segment += idle if segment is self._segments[-1] else []
            local = [of_segment.index(self._groups[k]) for k in segment.block]
            params = [self._params[k] for k in segment.block]
            inputs = params if segment.end is None else [*params, segment.end]
            rows: Rows = []
            for t, cotangent in enumerate(cotangents):
                if cotangent is None:
                    rows.append([None] * len(params))
                    continue
                later = any(other is not None for other in cotangents[t + 1 :])
                with part("VJPs"):
                    grads = vjp(segment.outputs, cotangent, inputs, later)
                rows.append(grads[: len(params)])
                below = grads[len(params) :]
                cotangents[t] = None if not below or below[0] is None else below
            yield of_segment, local, aligned(rows), combination

    def _gram(self, rows: Rows, local: Sequence[int]) -> Tensor:
        with part("gram"):
            if any(entry is not None for row in rows for entry in row):
                return ops.gram(rows, local)
            device = self._params[0].device
            return torch.zeros(max(local) + 1, len(rows), len(rows), dtype=wide_dtype(device), device=device)
