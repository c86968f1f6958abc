"""Groups of parameters one after the other: each is differentiated, weighed and written before the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmtl.engine.blocks import Blocks, Place, Segment, find_blocks
from fastmtl.engine.comm import Comm
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
        self._comms: list[Comm] = []
        self._told = False

    def prepare(self, batch: Batch) -> None:
        """Find out, once, where the trunk can be cut."""
        super().prepare(batch)
        if self.blocks is not None or not self.possible or self.structure.against_cut is not None:
            return
        problem = self.problem
        modules, params = list(problem.model.modules()), problem.shared_params
        with without_side_effects(problem):
            found = find_blocks(lambda: tensors_of(problem.trunk(batch.inputs)), modules, params, self.groups)
        # Other processes may have found others, in parts of the batch of other shapes.
        of_main = self.comm.of_main(None if found is None else (found.cuts, found.blocks))
        self.blocks = None if of_main is None else Blocks(modules, *of_main)
        if self.blocks is None:
            self.possible = False
            self.regions.report("vjps: all groups at once, as the network is no chain of them")
            return
        self._comms = [self.comm.of_block([params[k] for k in block]) for block in self.blocks.blocks]
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
        segments = self._segments(self.blocks, features, outputs)
        if segments is None:
            rows = self.rows_of(features, cotangents, batch)
            return BatchGradients(*detached(losses, preds), rows, task_grads, Combine())
        passes = _Passes(segments, cotangents, self.groups, self.count, self.problem.shared_params, self._comms)
        return BatchGradients(*detached(losses, preds), [], task_grads, passes)

    def _segments(
        self, blocks: Blocks, features: Sequence[Tensor], outputs: Mapping[Place, Tensor]
    ) -> list[Segment] | None:
        """Return the segments of this step's graphs; None, and say why once, if those of some process have none."""
        segments = blocks.segments(features, outputs, self.problem.shared_params)
        against = "in a step in which the network is no chain of them" if segments is None else None
        if has_gradient_hooks(self.problem.model):
            against = "as gradients have hooks, which would run twice"
        elif self.comm.tables or self.tables_of(features) is not None:
            against = "as the gradients of embedding tables have touched rows only"
        (stands,) = self.comm.any([against is not None])
        if stands and not self._told:
            self.regions.report(f"vjps: all groups at once {against or 'in a step in which another process needs it'}")
        self._told = self._told or stands
        return None if stands else segments


@dataclass(slots=True)
class _Part:
    """What is known of a segment.

    Attributes:
        comm: The communicator of its parameters.
        groups: Its groups, among 0 .. L-1.
        local: The place of each parameter's group among those.
        rows: T gradients, which may be on their way to other processes.
    """

    comm: Comm
    groups: list[int]
    local: list[int]
    rows: Rows = field(default_factory=list)


class _Passes(Pullback):
    """The backward passes of a chain of segments, each followed by the solve and the update of its groups.

    Where rows are sent to other processes, the last one of a segment is on its way during the first VJP of the next;
    the solve comes after that.

    Args:
        segments: The segments of the graph.
        cotangents: The T cotangents of the features.
        groups: The group of each parameter, 0 .. L-1.
        count: The number L of groups.
        params: The shared parameters.
        comms: The communicator of the parameters of each segment.
    """

    limits_by_gram = False

    def __init__(
        self,
        segments: Sequence[Segment],
        cotangents: Rows,
        groups: Sequence[int],
        count: int,
        params: Sequence[Tensor],
        comms: Sequence[Comm],
    ) -> None:
        self._segments = segments
        self._cotangents = cotangents
        self._groups = groups
        self._count = count
        self._params = params
        self._comms = comms
        self._done = False

    def decided(self, source: Jacobian, groups: Sequence[int] | None, decide: Decide) -> Weights:
        """Write the update of each segment with the weights that ``decide`` returns for its groups."""
        parts: list[Weights] = []

        def solve(piece: _Part, rows: Rows) -> Tensor:
            with part("gram"):
                gram = source.scaling.gram(piece.comm.gram(rows, piece.local, source.row_shares))
            weights = decide(gram, piece.groups)
            piece.comm.broadcast([weights.shared, weights.heads])
            parts.append(weights)
            return weights.shared

        places = self._run(solve, source.tasks)
        return joined(parts, places)

    def write(self, weights: Weights, source: HasRows, comm: Comm, tasks: Tasks) -> None:
        """Write the update with weights that were held, unless it is written."""
        if not self._done:
            self._run(lambda piece, rows: torch.stack([weights.shared[place] for place in piece.groups]), tasks)
        comm.all_reduce_grads(tasks, self._params)

    def _run(self, weigh: Callable[[_Part, Rows], Tensor], tasks: Tasks) -> list[int]:
        """Differentiate the segments and write their updates with the weights (l, T) of their l groups.

        Returns the groups in the order of the segments.
        """
        cotangents: list[Row | None] = list(self._cotangents)
        self._cotangents = []
        places: list[int] = []
        writing: list[Callable[[], object]] = []

        def finish(piece: _Part) -> None:
            rows = aligned(piece.comm.collect(piece.rows, final=True))
            # The update before had the VJPs of a whole segment to be sent.
            for wait in writing:
                wait()
            writing[:] = [piece.comm.start_write(rows, weigh(piece, rows), piece.local, tasks)]

        sent: list[_Part] = []
        for segment, comm in zip(self._segments, self._comms, strict=True):
            current = self._part(segment, comm)
            places += current.groups
            for t in range(len(cotangents)):
                row = self._row(segment, cotangents, t)
                if sent:
                    finish(sent.pop())
                current.rows.append(comm.send(row))
                # What has been sent need not stay.
                del row
            sent.append(current)
            if not comm.shards_rows:
                finish(sent.pop())
            # So that the next segment's rows can reuse the memory.
            del current
        for last in sent:
            finish(last)
        for wait in writing:
            wait()
        self._done = True
        return places

    def _part(self, segment: Segment, comm: Comm) -> _Part:
        groups = sorted({self._groups[k] for k in segment.block})
        if segment is self._segments[-1]:
            # Those whose parameters are all frozen are in none, and come last.
            groups += sorted(set(range(self._count)) - set(self._groups))
        return _Part(comm, groups, [groups.index(self._groups[k]) for k in segment.block])

    def _row(self, segment: Segment, cotangents: list[Row | None], t: int) -> Row:
        """Run the VJP of a task; put the cotangent of the next segment in the place of this one's."""
        params = [self._params[k] for k in segment.block]
        cotangent = cotangents[t]
        if cotangent is None:
            return [None] * len(params)
        later = any(other is not None for other in cotangents[t + 1 :])
        with part("VJPs"):
            inputs = params if segment.end is None else [*params, segment.end]
            grads = vjp(segment.outputs, cotangent, inputs, later)
        below = grads[len(params) :]
        cotangents[t] = None if not below or below[0] is None else below
        return grads[: len(params)]
