"""Task gradients of which each process has a part."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fastmtl import ops
from fastmtl.distributed.peers import Peers
from fastmtl.engine.comm import combine_into
from fastmtl.engine.model import Tasks
from fastmtl.engine.weights import Row, Rows
from fastmtl.errors import UsageError

__all__ = ["BUCKET_BYTES", "Pieces", "Shards", "UsedParams", "cut_buckets", "refuse_sparse"]

# Larger parameters get a bucket each.
BUCKET_BYTES = 25 * 2**20


class Pieces:
    """Rows of which each process has pieces.

    A row's pieces are a list of tensors, as :func:`fastmtl.ops.gram` and :func:`fastmtl.ops.combine_` take rows.
    """

    def __init__(self, params: Sequence[Tensor], peers: Peers) -> None:
        self.params = params
        self.peers = peers
        self.local_pieces = self.pieces(peers.rank)
        # Pending messages: a function that waits, and the buffer that must stay alive until then.
        self.pending: list[tuple[Callable[[], Any], Tensor]] = []

    def pieces(self, rank: int) -> list[tuple[int, int, int]]:
        """Return the pieces of a process as (index of the parameter, first element, number of elements).

        Elements beyond the end of a parameter are padding, always zero.
        """
        raise NotImplementedError

    def send(self, row: Row) -> Row:
        """Return this process's pieces of the reduced row, valid after :meth:`wait`."""
        return row

    def wait(self) -> None:
        """Wait for all pending messages; on a GPU the stream waits, not the host."""
        for wait, _ in self.pending:
            wait()
        self.pending.clear()

    def collect(self, rows: Rows) -> Rows:
        """Wait for the rows that were sent; return this process's pieces of them."""
        self.wait()
        return rows

    def write(self, rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None, tasks: Tasks = ()) -> None:
        """Fill ``.grad`` with ``sum_t w_t row_t``, valid after :meth:`wait`; see :meth:`Comm.write_shared`."""
        raise NotImplementedError

    @property
    def places(self) -> list[int]:
        """The index of the parameter that each of this process's pieces is of."""
        return [k for k, _, _ in self.local_pieces]

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of this process's pieces of a row."""
        return [torch.Size([size]) for _, _, size in self.local_pieces]

    def part_of(self, row: Tensor) -> Tensor:
        """Return this process's pieces of a row (P,) over all parameters, concatenated."""
        whole = row.split([param.numel() for param in self.params])
        parts = [(whole[k][begin : begin + size], size) for k, begin, size in self.local_pieces]
        return torch.cat([nn.functional.pad(part, (0, size - len(part))) for part, size in parts])

    def whole_of(self, part: Tensor) -> Tensor | None:
        """Return a row (P,) on the CPU from all processes' pieces, in the main process; None elsewhere."""
        parts = self.peers.gather_to_main(part.contiguous())
        if parts is None:
            return None
        sizes = [param.numel() for param in self.params]
        row = torch.empty(sum(sizes), dtype=part.dtype)
        whole = row.split(sizes)
        for rank, of_rank in enumerate(parts):
            pieces = self.pieces(rank)
            of_pieces = of_rank.cpu().split([size for _, _, size in pieces])
            for (k, begin, size), piece in zip(pieces, of_pieces, strict=True):
                target = whole[k][begin : begin + size]
                target.copy_(piece[: len(target)])
        return row

    def gram(self, rows: Sequence[Row], groups: Sequence[int] | None) -> Tensor:
        """Return the float64 Gram matrix (T, T) of T rows, or (L, T, T) with the group 0 .. L-1 of each parameter."""
        gram = ops.gram(rows, None if groups is None else [groups[k] for k in self.places])
        if groups is not None:
            # This part may have no piece of the last groups.
            gram = torch.cat([gram, gram.new_zeros(max(groups) + 1 - len(gram), *gram.shape[1:])])
        return self.peers.all_reduce(gram.contiguous())

    def combine(self, out: Row, rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None) -> None:
        """Fill the pieces ``out`` with ``sum_t w_t row_t``; None where no row has a piece."""
        combine_into(out, rows, weights, None if groups is None else [groups[k] for k in self.places])


class _Bucket:
    """Consecutive parameters of one dtype in a flat buffer, for ``size`` processes.

    Attributes:
        places: Their indices among the shared parameters.
        part: Length of a process's part of ``flat``.
        flat: (W part,) gradients to be sent, later the update.
        views: The part of ``flat`` of each parameter, in its shape.
    """

    def __init__(self, places: list[int], params: Sequence[Tensor], size: int) -> None:
        of_bucket = [params[k] for k in places]
        numbers = [param.numel() for param in of_bucket]
        self.places = places
        self.part = -(-sum(numbers) // size)
        self.flat = torch.zeros(self.part * size, dtype=of_bucket[0].dtype, device=of_bucket[0].device)
        flats = self.flat[: sum(numbers)].split(numbers)
        self.views = [flat.view(param.shape) for flat, param in zip(flats, of_bucket, strict=True)]

    def pieces(self, rank: int) -> list[tuple[int, int, int]]:
        """Return the pieces of a process, see :meth:`Pieces.pieces`."""
        first, begin, pieces = rank * self.part, 0, []
        for k, view in zip(self.places, self.views, strict=True):
            # The padding belongs to the last parameter, so that every process has some piece.
            end = len(self.flat) if k == self.places[-1] else begin + view.numel()
            a, b = max(begin, first), min(end, first + self.part)
            if a < b:
                pieces.append((k, a - begin, b - a))
            begin = end
        return pieces


class Shards(Pieces):
    """Reduce-scatters gradients of the shared parameters; each process keeps 1/W of every sum.

    Gradients are copied into flat buckets, which are sent asynchronously.
    """

    def __init__(self, params: Sequence[Tensor], peers: Peers) -> None:
        self._buckets = [_Bucket(places, params, peers.size) for places in cut_buckets(params, BUCKET_BYTES)]
        super().__init__(params, peers)
        self._sizes = [[size for _, _, size in bucket.pieces(peers.rank)] for bucket in self._buckets]
        self._seen = [False] * len(params)
        self._used_params = UsedParams(peers)

    @override
    def pieces(self, rank: int) -> list[tuple[int, int, int]]:
        return [piece for bucket in self._buckets for piece in bucket.pieces(rank)]

    def _allocate(self) -> tuple[list[Tensor], Row]:
        """Return new memory for this process's part of each bucket, and its pieces."""
        parts = [bucket.flat.new_empty(bucket.part) for bucket in self._buckets]
        sizes = zip(parts, self._sizes, strict=True)
        return parts, [piece for part, lengths in sizes for piece in part.split(lengths)]

    @override
    @torch.no_grad()
    def send(self, row: Row) -> Row:
        refuse_sparse(row)
        # The buckets hold one row at a time; the previous one had a whole VJP to be sent.
        self.wait()
        self._seen = [seen or grad is not None for seen, grad in zip(self._seen, row, strict=True)]
        parts, pieces = self._allocate()
        for bucket, part in zip(self._buckets, parts, strict=True):
            grads = [(row[k], view) for k, view in zip(bucket.places, bucket.views, strict=True)]
            torch._foreach_copy_(bucket.views, [torch.zeros_like(to) if grad is None else grad for grad, to in grads])
            self.pending.append((self.peers.reduce_scatter(part, bucket.flat), bucket.flat))
        return pieces

    @override
    @torch.no_grad()
    def write(self, rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None, tasks: Tasks = ()) -> None:
        used = self._used_params(self.params, self._seen, tasks)
        self._seen = [False] * len(self.params)
        parts, pieces = self._allocate()
        self.combine(pieces, rows, weights, groups)
        for bucket, part in zip(self._buckets, parts, strict=True):
            self.pending.append((self.peers.all_gather(bucket.flat, part), part))
        for bucket in self._buckets:
            for k, view in zip(bucket.places, bucket.views, strict=True):
                if used[k]:
                    self.params[k].grad = view


class UsedParams:
    """Which parameters have a gradient in some process, found in the first step of each set of tasks."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._used: dict[Hashable, list[bool]] = {}

    def __call__(self, params: Sequence[Tensor], has_grad: list[bool], key: Hashable) -> list[bool]:
        """Return which parameters are used in the steps named by ``key``, from ``has_grad`` of this process.

        Raises:
            UsageError: A parameter has a gradient, but had none in any process in the first of these steps.
        """
        if key not in self._used:
            self._used[key] = self.peers.all_reduce_any(has_grad)
        for param, has, used in zip(params, has_grad, self._used[key], strict=True):
            if has and not used:
                raise UsageError(
                    f"A parameter of shape {tuple(param.shape)} has a gradient, but had none in the first step of "
                    "these tasks: with several processes every step must use the same parameters as the first."
                )
        return self._used[key]


def refuse_sparse(grads: Row) -> None:
    """Refuse sparse gradients of parameters that are exchanged whole.

    Raises:
        UsageError: There is one.
    """
    for grad in grads:
        if grad is not None and grad.is_sparse:
            raise UsageError(
                f"A parameter of shape {tuple(grad.shape)} has a sparse gradient, which several processes exchange for "
                "tables only: those of modules with sparse=True, which look rows up in all processes."
            )


def cut_buckets(params: Sequence[Tensor], most: int) -> list[list[int]]:
    """Return the indices of each bucket's parameters: consecutive, of one dtype, ``most`` bytes or a single one."""
    buckets: list[list[int]] = []
    for _, same in groupby(range(len(params)), key=lambda k: params[k].dtype):
        size = most + 1
        for k in same:
            size += params[k].nbytes
            if size > most:
                buckets.append([])
                size = params[k].nbytes
            buckets[-1].append(k)
    return buckets
