"""The task gradients, each process with a part of every one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.distributed.peers import Peers
from fastmtl.engine.model import Tasks
from fastmtl.engine.weights import Row
from fastmtl.errors import UsageError

__all__ = ["BUCKET_BYTES", "Shards", "check_used", "cut_buckets"]

BUCKET_BYTES = 25 * 2**20


@dataclass(slots=True)
class _Bucket:
    """Neighbouring parameters of one dtype, flat one after the other.

    Attributes:
        params: Their places among the shared parameters.
        flat: (n,) gradients on their way out, then the update; n is a multiple of the number of processes.
        views: The part of ``flat`` of each parameter, in its shape.
        pieces: The place of each parameter in this process's part of ``flat``: parameter, begin, end.
    """

    params: list[int]
    flat: Tensor
    views: list[Tensor]
    pieces: list[tuple[int, int, int]]


class Shards:
    """Sums gradients of the shared parameters over all processes, each of which keeps 1/W of every sum.

    Gradients are copied into flat buckets and reduce-scattered while the caller goes on. A process's part of a row is a
    list of pieces, one for each parameter that lies in it, so that :func:`fastmtl.ops.gram` and
    :func:`fastmtl.ops.combine_` take parts as they take rows.

    Args:
        params: The shared parameters.
        peers: The processes.
        bucket_bytes: Size of a bucket; a greater parameter has one of its own.
    """

    def __init__(self, params: Sequence[Tensor], peers: Peers, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.params = params
        self.peers = peers
        self._buckets = [self._bucket(places) for places in cut_buckets(params, bucket_bytes)]
        self._owners = [piece[0] for bucket in self._buckets for piece in bucket.pieces]
        self._on_the_way: list[Any] = []
        self._seen = [False] * len(params)
        self._used: dict[Tasks, list[bool]] = {}

    def _bucket(self, places: list[int]) -> _Bucket:
        params = [self.params[k] for k in places]
        ends = list(accumulate(param.numel() for param in params))
        begins = [0, *ends[:-1]]
        part = -(-ends[-1] // self.peers.size)
        flat = torch.zeros(part * self.peers.size, dtype=params[0].dtype, device=params[0].device)
        views = [flat[a:b].view(param.shape) for a, b, param in zip(begins, ends, params, strict=True)]
        first, last = self.peers.rank * part, (self.peers.rank + 1) * part
        # The padding, always zero, counts as the last parameter's, so that every process has some piece.
        ends[-1] = len(flat)
        pieces = [
            (k, max(a, first) - first, min(b, last) - first)
            for k, a, b in zip(places, begins, ends, strict=True)
            if min(b, last) > max(a, first)
        ]
        return _Bucket(places, flat, views, pieces)

    @torch.no_grad()
    def send(self, row: Sequence[Tensor | None]) -> Row:
        """Begin to sum a gradient over the processes; return this process's pieces, valid after :meth:`wait`.

        Args:
            row: One gradient for each parameter; None is zero.
        """
        # The buckets hold one row at a time; the one before had a whole VJP to leave them.
        self.wait()
        found: Row = []
        for bucket in self._buckets:
            targets, sources = [], []
            for k, view in zip(bucket.params, bucket.views, strict=True):
                grad = row[k]
                if grad is None:
                    view.zero_()
                    continue
                self._seen[k] = True
                targets.append(view)
                sources.append(grad)
            torch._foreach_copy_(targets, sources) if targets else None
            part = bucket.flat.new_empty(len(bucket.flat) // self.peers.size)
            self._on_the_way.append(self.peers.reduce_scatter(part, bucket.flat))
            found += [part[a:b] for _, a, b in bucket.pieces]
        return found

    def wait(self) -> None:
        """Wait until all that was sent has arrived; on a GPU the stream waits, not the host."""
        for work in self._on_the_way:
            work.wait()
        self._on_the_way.clear()

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of this process's pieces of a row."""
        return [torch.Size([b - a]) for bucket in self._buckets for _, a, b in bucket.pieces]

    def part_of(self, row: Tensor) -> Tensor:
        """Return this process's pieces of a row (P,) over all parameters, one after the other."""
        whole = row.split([param.numel() for param in self.params])
        parts = []
        for bucket in self._buckets:
            flat = torch.cat([whole[k] for k in bucket.params])
            flat = nn.functional.pad(flat, (0, len(bucket.flat) - len(flat)))
            parts.append(flat.chunk(self.peers.size)[self.peers.rank])
        return torch.cat(parts)

    def whole_of(self, part: Tensor) -> Tensor | None:
        """Return a row (P,), on the CPU, in the leading process from all processes' pieces of it; None elsewhere."""
        parts = self.peers.to_leader(part.contiguous())
        if parts is None:
            return None
        sizes = [len(bucket.flat) // self.peers.size for bucket in self._buckets]
        flats = [torch.cat(column) for column in zip(*(each.cpu().split(sizes) for each in parts), strict=True)]
        found: dict[int, Tensor] = {}
        for bucket, flat in zip(self._buckets, flats, strict=True):
            numbers = [self.params[k].numel() for k in bucket.params]
            found |= zip(bucket.params, flat[: sum(numbers)].split(numbers), strict=True)
        return torch.cat([found[k] for k in range(len(self.params))])

    def groups(self, groups: Sequence[int] | None) -> list[int] | None:
        """Return the group of each piece from that of each parameter."""
        return None if groups is None else [groups[k] for k in self._owners]

    def gram(self, rows: Sequence[Row], groups: Sequence[int] | None) -> Tensor:
        """Return the float64 Gram matrix of the summed gradients, from all processes' pieces of them.

        Args:
            rows: T rows of pieces.
            groups: The group of each parameter, 0 .. L-1.

        Returns:
            (T, T), or (L, T, T) with groups.
        """
        gram = ops.gram(rows, self.groups(groups))
        if groups is not None:
            # This part may have no piece of the last groups.
            gram = torch.cat([gram, gram.new_zeros(max(groups) + 1 - len(gram), *gram.shape[1:])])
        return self.peers.sum_(gram.contiguous())

    @torch.no_grad()
    def write(self, rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None, tasks: Tasks = ()) -> None:
        """Fill ``.grad`` of all parameters that some task reaches with ``sum_t w_t row_t``.

        Which those are is learned in the first step of the same tasks.

        Args:
            rows: Rows of pieces.
            weights: One for each row; (L, rows) with groups.
            groups: The group of each parameter.
            tasks: The tasks whose rows these are.
        """
        if tasks not in self._used:
            self._used[tasks] = self.peers.any_(self._seen)
        check_used(self.params, self._seen, self._used[tasks])
        self._seen = [False] * len(self.params)
        parts = [bucket.flat.new_empty(len(bucket.flat) // self.peers.size) for bucket in self._buckets]
        out = [part[a:b] for part, bucket in zip(parts, self._buckets, strict=True) for _, a, b in bucket.pieces]
        of_piece = self.groups(groups)
        if of_piece is not None:
            weights = weights[: max(of_piece) + 1]
        ops.combine_(out, rows, weights, of_piece)
        coming = [self.peers.all_gather(bucket.flat, part) for bucket, part in zip(self._buckets, parts, strict=True)]
        for work in coming:
            work.wait()
        for bucket in self._buckets:
            for k, view in zip(bucket.params, bucket.views, strict=True):
                if self._used[tasks][k]:
                    self.params[k].grad = view


def check_used(params: Sequence[Tensor], has_grad: Sequence[bool], is_used: Sequence[bool]) -> None:
    """Refuse gradients that the processes have not agreed to sum.

    Raises:
        UsageError: A parameter has a gradient, but had none in any process in the first step of the same tasks.
    """
    for param, has, used in zip(params, has_grad, is_used, strict=True):
        if has and not used:
            raise UsageError(
                f"A parameter of shape {tuple(param.shape)} has a gradient, but had none in the first step of these "
                "tasks: with several processes, what a step uses must be in use from the first one on."
            )


def cut_buckets(params: Sequence[Tensor], most: int) -> list[list[int]]:
    """Return the places of the parameters of each bucket."""
    found: list[list[int]] = []
    for _, same in groupby(range(len(params)), key=lambda k: params[k].dtype):
        size = most + 1
        for k in same:
            bytes_of_k = params[k].numel() * params[k].element_size()
            if size + bytes_of_k > most:
                found.append([])
                size = 0
            found[-1].append(k)
            size += bytes_of_k
    return found
