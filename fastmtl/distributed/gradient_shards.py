"""Gradients of which each process keeps the pieces of its shards of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import override

from fastmtl.distributed.shards import BUCKET_BYTES, Pieces, UsedParams, cut_buckets, refuse_sparse
from fastmtl.engine.model import Tasks
from fastmtl.engine.vjp import Cotangents, seeded
from fastmtl.engine.weights import Row
from fastmtl.errors import UsageError

if TYPE_CHECKING:
    from fastmtl.distributed.sharded import ShardedModel

__all__ = ["BlockShards", "GradientShards"]


class _ShardPieces(Pieces):
    """Rows that are cut as FSDP cuts parameters: along the first dimension, with padding at the end.

    Args:
        shared: The parameters of the rows.
        others: Further parameters that are cut.
        model: The model with the shards.

    Raises:
        UsageError: A shared parameter is a scalar.
    """

    def __init__(self, shared: Sequence[Tensor], others: Sequence[Tensor], model: ShardedModel) -> None:
        if any(param not in model.shard_of for param in shared):
            raise UsageError("shard='fsdp' cannot shard shared parameters that are scalars.")
        self.model = model
        self._all = [*shared, *others]
        self._count = len(shared)
        self._pads = [-(-param.shape[0] // model.peers.size) * param[:1].numel() for param in self._all]
        super().__init__(shared, model.peers)

    @override
    def pieces(self, rank: int) -> list[tuple[int, int, int]]:
        return [(k, rank * pad, pad) for k, pad in enumerate(self._pads[: self._count])]

    def _add_to_shards(self, pieces: Row) -> None:
        """Add pieces to ``.grad`` of the shards of the first parameters."""
        for param, piece in zip(self._all, pieces, strict=False):
            if piece is not None:
                shard = self.model.shard_of[param]
                grad = piece[: shard.numel()].view(shard.shape)
                shard.grad = grad if shard.grad is None else shard.grad + grad


class BlockShards(_ShardPieces):
    """Reduce-scatters whole rows of a block of parameters, while other rows are differentiated.

    The update is that of the shards, so that nothing is gathered.
    """

    def __init__(self, params: Sequence[Tensor], model: ShardedModel) -> None:
        super().__init__(params, [], model)
        self._buckets = cut_buckets(params, BUCKET_BYTES)
        self._seen = [False] * len(params)
        self._used_params = UsedParams(self.peers)

    @override
    @torch.no_grad()
    def send(self, row: Row) -> Row:
        refuse_sparse(row)
        # One row at a time; the previous one had a whole VJP to be sent.
        self.wait()
        self._seen = [seen or grad is not None for seen, grad in zip(self._seen, row, strict=True)]
        pieces: Row = []
        for places in self._buckets:
            sizes = [self._pads[k] for k in places]
            flat = self.params[places[0]].new_zeros(self.peers.size, sum(sizes))
            for k, column in zip(places, flat.split(sizes, dim=1), strict=True):
                grad = row[k]
                if grad is not None:
                    _add_cut(column, grad)
            part = flat.new_empty(sum(sizes))
            self.pending.append((self.peers.reduce_scatter(part, flat.view(-1)), flat))
            pieces += part.split(sizes)
        return pieces

    @override
    @torch.no_grad()
    def write(self, rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None, tasks: Tasks = ()) -> None:
        used = self._used_params(self.params, self._seen, tasks)
        self._seen = [False] * len(self.params)
        out: Row = [
            param.new_empty(pad) if is_used and param.requires_grad else None
            for param, pad, is_used in zip(self.params, self._pads, used, strict=True)
        ]
        self.combine(out, rows, weights, groups)
        self._add_to_shards(out)


@dataclass(slots=True)
class _Incoming:
    """Parameters whose gradients are sent together.

    Attributes:
        begins: Offset of each parameter's piece in a process's part.
        size: Length of a part.
        flat: (W, size) gradients that wait for the others of the bucket; None before the first.
        arrived: Parameters whose gradients are in ``flat``.
    """

    begins: dict[int, int] = field(default_factory=dict)
    size: int = 0
    flat: Tensor | None = None
    arrived: set[int] = field(default_factory=set)


class GradientShards(_ShardPieces):
    """Reduce-scatters gradients during the backward pass; each process keeps its shard of every sum.

    A gradient is copied into its bucket and freed at once; a full bucket is reduce-scattered while the backward pass
    goes on, one at a time. All processes must run the same graph, which decides the order of the buckets.
    """

    def __init__(
        self, shared: Sequence[nn.Parameter], task_params: Sequence[nn.Parameter], model: ShardedModel
    ) -> None:
        cut = [param for param in task_params if param in model.shard_of]
        super().__init__(shared, cut, model)
        self._buckets: list[_Incoming] = []
        self._bucket_of: dict[int, _Incoming] = {}
        for first, params in ((0, shared), (len(shared), cut)):
            for places in cut_buckets(params, BUCKET_BYTES):
                self._buckets.append(bucket := _Incoming())
                for k in (first + place for place in places):
                    self._bucket_of[k] = bucket
                    bucket.begins[k] = bucket.size
                    bucket.size += self._pads[k]
        # This process's pieces of the sums; several if a parameter was reached several times.
        self._sums: list[list[Tensor]] = [[] for _ in self._all]
        self._takes_task_params = True
        for k, param in enumerate(self._all):
            param.register_post_accumulate_grad_hook(partial(self._arrive, k))

    def _arrive(self, k: int, param: Tensor) -> None:
        if param.grad is not None and (k < self._count or self._takes_task_params):
            grad, param.grad = param.grad, None
            self._take(k, grad)

    @torch.no_grad()
    def _take(self, k: int, grad: Tensor) -> None:
        """Copy a gradient into its bucket, and send the bucket if it is full."""
        bucket, pad = self._bucket_of[k], self._pads[k]
        if bucket.flat is None:
            bucket.flat = grad.new_zeros(self.peers.size, bucket.size)
        _add_cut(bucket.flat[:, bucket.begins[k] : bucket.begins[k] + pad], grad)
        bucket.arrived.add(k)
        if len(bucket.arrived) == len(bucket.begins):
            self._send(bucket)

    def _send(self, bucket: _Incoming) -> None:
        flat, bucket.flat = bucket.flat, None
        assert flat is not None
        self.wait()
        part = flat.new_empty(bucket.size)
        for k in bucket.arrived:
            self._sums[k].append(part[bucket.begins[k] :][: self._pads[k]])
        bucket.arrived.clear()
        self.pending.append((self.peers.reduce_scatter(part, flat.view(-1)), flat))

    def _collect(self) -> Row:
        """Send the remaining buckets and return this process's flat pieces of all sums, None without a gradient."""
        for bucket in self._buckets:
            if bucket.flat is not None:
                self._send(bucket)
        self.wait()
        pieces = [reduce(torch.add, sums) if sums else None for sums in self._sums]
        self._sums = [[] for _ in self._all]
        return pieces

    def stream(
        self, outputs: Sequence[Tensor], cotangents: Cotangents, task_params: Sequence[Tensor], retain: bool
    ) -> tuple[Row, Row]:
        """Differentiate; return pieces of the shared parameters' gradients, and whole ones of ``task_params``."""
        pairs = seeded(outputs, cotangents)
        wanted = [param for param in (*self.params, *task_params) if param.requires_grad]
        if not pairs or not wanted:
            return [None] * self._count, [None] * len(task_params)
        self._takes_task_params = False
        try:
            torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs], retain_graph=retain, inputs=wanted)
        finally:
            self._takes_task_params = True
        grads = [param.grad for param in task_params]
        for param in task_params:
            param.grad = None
        return self._collect()[: self._count], grads

    @override
    @torch.no_grad()
    def write(self, rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None, tasks: Tasks = ()) -> None:
        out = [
            self.params[k].new_empty(self._pads[k]) if any(row[k] is not None for row in rows) else None
            for k in range(self._count)
        ]
        self.combine(out, rows, weights, groups)
        self._add_to_shards(out)

    @torch.no_grad()
    def reduce(self) -> None:
        """Reduce-scatter ``.grad`` of the gathered parameters, and add it to ``.grad`` of their shards."""
        for k, param in enumerate(self._all):
            self._arrive(k, param)
        self._add_to_shards(self._collect())

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | Tensor, shared_only: bool, kept: Sequence[Tensor]) -> None:
        """Clip the total norm of the gradients at ``max_norm``; ``kept`` are whole in every process."""
        params = self.params if shared_only else self._all
        grads = [grad for param in params if (grad := self.model.shard_of[param].grad) is not None]
        whole = [param.grad for param in kept if param.grad is not None]
        square = torch.stack([grad.square().sum() for grad in grads]).sum() if grads else torch.zeros(())
        square = self.peers.all_reduce(square.clone()) + sum(grad.square().sum() for grad in whole)
        factor = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1)
        for grad in (*grads, *whole):
            grad.mul_(factor.to(grad.dtype))


def _add_cut(parts: Tensor, grad: Tensor) -> None:
    """Add a gradient to the parts (W, n) of it that the processes get, of which the last ones may be shorter."""
    line, size = grad.reshape(-1), parts.shape[1]
    rows = len(line) // size
    parts[:rows] += line[: rows * size].view(rows, size)
    if rows * size < len(line):
        parts[rows, : len(line) - rows * size] += line[rows * size :]
