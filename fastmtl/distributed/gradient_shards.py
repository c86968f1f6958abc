"""Gradients that arrive as shards while a backward pass finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.distributed.sharded import ShardedModel
from fastmtl.distributed.shards import BUCKET_BYTES, cut_buckets
from fastmtl.engine.model import Tasks
from fastmtl.engine.weights import Row
from fastmtl.errors import UsageError

__all__ = ["GradientShards"]


@dataclass(slots=True)
class _Incoming:
    """Parameters whose gradients travel together.

    Attributes:
        begins: Where the piece of each parameter begins in a process's part.
        size: Length of a part.
        flat: (W, size) gradients that wait for the others of the bucket; None before the first.
        arrived: Which are there.
        reached: Which have been there since the parts were collected.
        parts: (size,) sums that were sent for, this process's part.
    """

    begins: dict[int, int]
    size: int
    flat: Tensor | None = None
    arrived: set[int] = field(default_factory=set)
    reached: set[int] = field(default_factory=set)
    parts: list[Tensor] = field(default_factory=list)


class GradientShards:
    """Sums gradients over the processes while a backward pass finds them; each process keeps its shard of every sum.

    A gradient is copied into its bucket and freed as soon as it is known; a full bucket is reduce-scattered while the
    backward pass goes on, one at a time. All processes must run the same graph, as it decides the order of buckets.

    Args:
        shared: The gathered shared parameters.
        own: The gathered task-specific parameters.
        model: Whose parameters they are.
        bucket_bytes: Size of a bucket, `BUCKET_BYTES` if None; a greater parameter has one of its own.
    """

    def __init__(
        self,
        shared: Sequence[nn.Parameter],
        own: Sequence[nn.Parameter],
        model: ShardedModel,
        bucket_bytes: int | None = None,
    ) -> None:
        self.peers = model.peers
        self.model = model
        self.params = [*shared, *(param for param in own if param in model.shard_of)]
        self._count = len(shared)
        if any(param not in model.shard_of for param in shared):
            raise UsageError("shard='fsdp' cannot cut shared parameters that are scalars.")
        self._own = self.params[len(shared) :]
        self._pads = [-(-param.shape[0] // self.peers.size) * param[:1].numel() for param in self.params]
        bucket_bytes = BUCKET_BYTES if bucket_bytes is None else bucket_bytes
        places = [
            *cut_buckets(shared, bucket_bytes),
            *([k + len(shared) for k in some] for some in cut_buckets(self._own, bucket_bytes)),
        ]
        self._buckets = [self._bucket(some) for some in places]
        self._bucket_of = {k: bucket for bucket in self._buckets for k in bucket.begins}
        self._on_the_way: tuple[Any, Tensor] | None = None
        self._takes_own = True
        for k, param in enumerate(self.params):
            param.register_post_accumulate_grad_hook(self._hook(k))

    def _bucket(self, places: list[int]) -> _Incoming:
        begins, size = {}, 0
        for k in places:
            begins[k] = size
            size += self._pads[k]
        return _Incoming(begins, size)

    def _hook(self, k: int) -> Callable[[Tensor], None]:
        def take(param: Tensor) -> None:
            if k < self._count or self._takes_own:
                grad, param.grad = param.grad, None
                assert grad is not None
                self._take(k, grad)

        return take

    @torch.no_grad()
    def _take(self, k: int, grad: Tensor) -> None:
        """Put a gradient in its bucket, and send the bucket if it is full."""
        bucket, pad = self._bucket_of[k], self._pads[k]
        if bucket.flat is None:
            bucket.flat = grad.new_zeros(self.peers.size, bucket.size)
        column = bucket.flat[:, bucket.begins[k] : bucket.begins[k] + pad]
        line = grad.reshape(-1)
        rows = len(line) // pad
        column[:rows] += line[: rows * pad].view(rows, pad)
        if rows * pad < len(line):
            column[rows, : len(line) - rows * pad] += line[rows * pad :]
        bucket.arrived.add(k)
        if len(bucket.arrived) == len(bucket.begins):
            self._send(bucket)

    def _send(self, bucket: _Incoming) -> None:
        flat = bucket.flat
        assert flat is not None
        bucket.flat = None
        bucket.reached |= bucket.arrived
        bucket.arrived.clear()
        self._wait()
        part = flat.new_empty(bucket.size)
        bucket.parts.append(part)
        self._on_the_way = self.peers.reduce_scatter(part, flat.view(-1)), flat

    def _wait(self) -> None:
        if self._on_the_way is not None:
            self._on_the_way[0].wait()
            self._on_the_way = None

    def _collect(self) -> Row:
        """Send what is left, and return this process's pieces of what has arrived, flat; None where nothing has."""
        for bucket in self._buckets:
            if bucket.flat is not None:
                self._send(bucket)
        self._wait()
        found: Row = [None] * len(self.params)
        for bucket in self._buckets:
            if bucket.parts:
                part = bucket.parts[0] if len(bucket.parts) == 1 else torch.stack(bucket.parts).sum(0)
                for k in bucket.reached:
                    begin = bucket.begins[k]
                    found[k] = part[begin : begin + self._pads[k]]
                bucket.parts, bucket.reached = [], set()
        return found

    def stream(
        self,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        own: Sequence[Tensor],
        retain: bool,
    ) -> tuple[Row, Row]:
        """Differentiate; return the pieces of the shared parameters' gradients, and the whole ones of ``own``."""
        pairs = [
            (o, torch.ones_like(o) if c is None else c)
            for o, c in zip(outputs, cotangents, strict=True)
            if o.requires_grad and (c is not None or not o.dim())
        ]
        wanted = [param for param in (*self.params[: self._count], *own) if param.requires_grad]
        if not pairs or not wanted:
            return [None] * self._count, [None] * len(own)
        self._takes_own = False
        try:
            torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs], retain_graph=retain, inputs=wanted)
        finally:
            self._takes_own = True
        found: Row = []
        for param in own:
            found.append(param.grad)
            param.grad = None
        return self._collect()[: self._count], found

    def send(self, row: Sequence[Tensor | None]) -> Row:
        """Return a row as it is: its pieces arrived with the backward pass."""
        return list(row)

    def wait(self) -> None:
        """Do nothing: the pieces are there."""

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of this process's pieces of a row."""
        return [torch.Size([pad]) for pad in self._pads[: self._count]]

    def part_of(self, row: Tensor) -> Tensor:
        """Return this process's pieces of a row (P,) over the shared parameters, one after the other."""
        whole = row.split([param.numel() for param in self.params[: self._count]])
        pads = self._pads[: self._count]
        begins = [self.peers.rank * pad for pad in pads]
        parts = [each[a : a + pad] for each, a, pad in zip(whole, begins, pads, strict=True)]
        return torch.cat([nn.functional.pad(p, (0, pad - len(p))) for p, pad in zip(parts, pads, strict=True)])

    def whole_of(self, part: Tensor) -> Tensor | None:
        """Return a row (P,), on the CPU, in the leading process from all processes' pieces of it; None elsewhere."""
        parts = self.peers.to_leader(part.contiguous())
        if parts is None:
            return None
        columns = zip(*(each.cpu().split(self._pads[: self._count]) for each in parts), strict=True)
        sizes = [param.numel() for param in self.params[: self._count]]
        return torch.cat([torch.cat(column)[:size] for column, size in zip(columns, sizes, strict=True)])

    def gram(self, rows: Sequence[Row], groups: Sequence[int] | None) -> Tensor:
        """Return the float64 Gram matrix of the summed gradients, (T, T) or (L, T, T), from all processes' pieces."""
        return self.peers.sum_(ops.gram(rows, None if groups is None else list(groups)).contiguous())

    @torch.no_grad()
    def write(self, rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None, tasks: Tasks = ()) -> None:
        """Fill ``.grad`` of the shared parameters' shards with ``sum_t w_t row_t``; see :meth:`Shards.write`."""
        used = [k for k in range(self._count) if any(row[k] is not None for row in rows)]
        like = [next(row[k] for row in rows if row[k] is not None) for k in used]
        out = [torch.empty_like(each) for each in like if each is not None]
        some = None if groups is None else [groups[k] for k in used]
        if some is not None:
            weights = weights[: max(some, default=-1) + 1]
        ops.combine_(out, [[row[k] for k in used] for row in rows], weights, some)
        for k, grad in zip(used, out, strict=True):
            self._set(k, grad)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum over the processes what lies in ``.grad`` of gathered parameters, and add it to that of their shards."""
        for k, param in enumerate(self.params):
            grad, param.grad = param.grad, None
            if grad is not None:
                self._take(k, grad)
            del grad
        for k, piece in enumerate(self._collect()):
            if piece is not None:
                self._set(k, piece)

    def _set(self, k: int, piece: Tensor) -> None:
        shard = self.model.shard_of[self.params[k]]
        grad = piece[: shard.numel()].view(shard.shape)
        shard.grad = grad if shard.grad is None else shard.grad + grad

    @torch.no_grad()
    def clip(self, max_norm: float | Tensor, shared_only: bool, kept: Sequence[Tensor]) -> None:
        """Bring the norm of the gradients together down to ``max_norm``; ``kept`` are whole in every process."""
        params = self.params[: self._count] if shared_only else self.params
        grads = [grad for param in params if (grad := self.model.shard_of[param].grad) is not None]
        whole = [param.grad for param in kept if param.grad is not None]
        square = torch.stack([grad.square().sum() for grad in grads]).sum() if grads else torch.zeros(())
        square = self.peers.sum_(square.clone()) + sum(grad.square().sum() for grad in whole)
        factor = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1)
        for grad in (*grads, *whole):
            grad.mul_(factor.to(grad.dtype))
