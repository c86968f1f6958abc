"""Sparse gradients of tables: only the rows that are touched go from process to process."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from fastmtl import ops
from fastmtl.distributed.peers import Peers
from fastmtl.distributed.shards import Pieces, Shards
from fastmtl.engine.comm import combined
from fastmtl.engine.model import Tasks
from fastmtl.engine.weights import Row, Rows
from fastmtl.errors import UsageError
from fastmtl.ops._touched import Touched, compacted

__all__ = ["TableRows", "TableShards"]

T = TypeVar("T")

# Knuth's multiplier for hashing, and the bits kept of a product: ids with a common factor are dealt out evenly.
_MULTIPLIER, _MASK, _SHIFT = 2654435761, 2**62 - 1, 16


class TableRows:
    """Sums sparse gradients of K tables over the processes.

    Each row of a table has an owner, the process that its number is hashed to. Processes send the rows that they touch
    to the owners, which add them up: :meth:`reduce`. Owners send the sums to all: :meth:`gather`. Numbers of rows go
    once, whatever the number of gradients.

    Args:
        tables: K tensors with the shapes, dtypes and devices of the gradients.
        peers: The W processes.
    """

    def __init__(self, tables: Sequence[Tensor], peers: Peers) -> None:
        self.tables = tables
        self.peers = peers
        self._widths = [math.prod(table.shape[1:]) for table in tables]

    @torch.no_grad()
    def all_reduce(self, rows: Rows) -> Rows:
        """Return the sums over the processes, sparse and coalesced; None where no process has a gradient.

        Args:
            rows: R lists of the K gradients.

        Raises:
            UsageError: A gradient is dense.
        """
        return self.gather(self.reduce(rows))

    @torch.no_grad()
    def reduce(self, rows: Rows) -> Rows:
        """Return the sums at the rows that this process owns, at the same indices in all R gradients of a table.

        None where no process has a gradient. See :meth:`all_reduce`.
        """
        if not self.tables:
            return [[] for _ in rows]
        indices, values = self._compact(rows)
        owners = [((ids * _MULTIPLIER & _MASK) >> _SHIFT) % self.peers.size for ids in indices]
        orders = [of_ids.argsort(stable=True) for of_ids in owners]
        counts = torch.stack([torch.bincount(of_ids, minlength=self.peers.size) for of_ids in owners]).tolist()
        sizes, reached = self._tell(rows, counts)
        matrices = [
            self._matrix(k, [values[t][k] for t in present], ids)[order]
            for k, (ids, order, present) in enumerate(zip(indices, orders, reached, strict=True))
        ]
        ids_here = self._to_owners([ids[order] for ids, order in zip(indices, orders, strict=True)], counts, sizes)
        values_here = self._to_owners(matrices, counts, sizes)
        sums: Rows = [[None] * len(self.tables) for _ in rows]
        for k, present in enumerate(reached):
            if not present:
                continue
            distinct, order, starts = ops.group_rows(ids_here[k])
            (total,) = ops.sum_rows([values_here[k]], order, starts)
            self._spread(sums, k, present, distinct, total)
        return sums

    @torch.no_grad()
    def gather(self, rows: Rows) -> Rows:
        """Return whole gradients from the pieces of all processes, as :meth:`reduce` returns them."""
        if not self.tables:
            return [[] for _ in rows]
        reached = [[t for t, grad in enumerate(column) if grad is not None] for column in zip(*rows, strict=True)]
        indices, matrices = [], []
        for k, present in enumerate(reached):
            grads = [grad for row in rows if (grad := row[k]) is not None]
            ids = grads[0]._indices()[0] if present else self._no_ids(k)
            indices.append(ids)
            matrices.append(self._matrix(k, [grad._values() for grad in grads], ids))
        size = self.peers.size
        told = self.peers.exchange([[len(ids) for ids in indices]] * size)
        sizes = [[told[r][k] for r in range(size)] for k in range(len(self.tables))]
        every = self._to_all(indices, sizes)
        every_value = self._to_all(matrices, sizes)
        whole: Rows = [[None] * len(self.tables) for _ in rows]
        for k, present in enumerate(reached):
            if present:
                # No row has two owners.
                ids, order = every[k].sort()
                self._spread(whole, k, present, ids, every_value[k][order])
        return whole

    def _compact(self, rows: Rows) -> tuple[list[Tensor], Rows]:
        """Return for each table the rows that some gradient touches, and the R x K values there."""
        for row in rows:
            for grad in row:
                if grad is not None and not (grad.is_sparse and grad.sparse_dim() == 1):
                    raise UsageError(
                        f"A table of shape {tuple(grad.shape)} with sparse=True has a dense gradient, as of a weight "
                        "that is not only looked up: in several processes it needs sparse=False."
                    )
        values, touched = compacted([grad for row in rows for grad in row], len(rows))
        indices = [self._no_ids(k) if places is None else places.indices[0] for k, places in enumerate(touched)]
        return indices, _chunks(values, len(self.tables))

    def _no_ids(self, k: int) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=self.tables[k].device)

    def _tell(self, rows: Rows, counts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Tell each process how many rows it gets from this one, ``counts`` (K, W), and which gradients this one has.

        Returns (K, W) numbers of rows that each sends to this one, and for each table the gradients that any has.
        """
        every = range(len(self.tables))
        facts = [[counts[k][r], *(row[k] is not None for row in rows)] for r in range(self.peers.size) for k in every]
        width = len(self.tables)
        told = self.peers.exchange([[int(n) for fact in of_rank for n in fact] for of_rank in _chunks(facts, width)])
        heads = [_chunks(numbers, 1 + len(rows)) for numbers in told]
        sizes = [[head[k][0] for head in heads] for k in every]
        return sizes, [[t for t in range(len(rows)) if any(head[k][1 + t] for head in heads)] for k in every]

    def _matrix(self, k: int, values: Row, ids: Tensor) -> Tensor:
        """Return r values of the rows ``ids`` of a table side by side, (U, r d) in its dtype, zeros for None."""
        table, width = self.tables[k], self._widths[k]
        matrix = torch.zeros(len(ids), len(values), width, dtype=table.dtype, device=table.device)
        for place, value in enumerate(values):
            if value is not None:
                matrix[:, place] = value.reshape(len(ids), width)
        return matrix.flatten(1)

    def _to_owners(
        self, of_tables: Sequence[Tensor], counts: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Return what the processes send to this one of K tensors (U_k, ...), ordered by owner.

        ``counts`` (K, W) are the rows for each process, ``sizes`` (K, W) those from each.
        """
        received: dict[int, Tensor] = {}
        for places in _by_dtype(of_tables):
            some = [of_tables[k] for k in places]
            parts = [tensor.split(list(counts[k])) for k, tensor in zip(places, some, strict=True)]
            sent = torch.cat([part.reshape(-1) for of_rank in zip(*parts, strict=True) for part in of_rank])
            lengths, expected = (
                [sum(numbers[k][r] * math.prod(of_tables[k].shape[1:]) for k in places) for r in range(self.peers.size)]
                for numbers in (counts, sizes)
            )
            got = self.peers.all_to_all(sent, lengths, expected).split(expected)
            received |= _taken_apart(places, some, got, sizes)
        return [received[k] for k in range(len(of_tables))]

    def _to_all(self, of_tables: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the K tensors (U_k, ...) of all processes, one behind the other."""
        received: dict[int, Tensor] = {}
        for places in _by_dtype(of_tables):
            some = [of_tables[k] for k in places]
            lengths = [
                sum(sizes[k][r] * math.prod(of_tables[k].shape[1:]) for k in places) for r in range(self.peers.size)
            ]
            got = self.peers.all_gather_parts(torch.cat([tensor.reshape(-1) for tensor in some]), lengths)
            received |= _taken_apart(places, some, got, sizes)
        return [received[k] for k in range(len(of_tables))]

    def _spread(self, rows: Rows, k: int, present: Sequence[int], ids: Tensor, matrix: Tensor) -> None:
        """Put the gradients of table k, side by side in a matrix, into their rows."""
        table = self.tables[k]
        touched = Touched(ids[None], table.shape)
        by_row = matrix.view(len(ids), len(present), self._widths[k]).transpose(0, 1).contiguous()
        for t, values in zip(present, by_row, strict=True):
            rows[t][k] = touched.sparse(values.view(len(ids), *table.shape[1:]))


class TableShards(Pieces):
    """Rows of shared parameters of which some are tables: this process's pieces are shards, and rows of tables.

    Shards are reduce-scattered as each gradient is known, rows of tables all at once when the last one is.
    """

    def __init__(self, params: Sequence[Tensor], tables: Collection[Tensor], peers: Peers) -> None:
        self._dense = [k for k, param in enumerate(params) if param not in tables]
        self._tables = [k for k, param in enumerate(params) if param in tables]
        self._shards = Shards([params[k] for k in self._dense], peers)
        self._table_rows = TableRows([params[k] for k in self._tables], peers)
        super().__init__(params, peers)

    @override
    def pieces(self, rank: int) -> list[tuple[int, int, int]]:
        """Return the pieces that are no rows of tables."""
        return [(self._dense[k], begin, size) for k, begin, size in self._shards.pieces(rank)]

    @property
    @override
    def places(self) -> list[int]:
        return [*super().places, *self._tables]

    @override
    def send(self, row: Row) -> Row:
        return [*self._shards.send([row[k] for k in self._dense]), *(row[k] for k in self._tables)]

    @override
    def wait(self) -> None:
        self._shards.wait()

    @override
    def collect(self, rows: Rows) -> Rows:
        count = len(self.local_pieces)
        of_tables = self._table_rows.reduce([row[count:] for row in rows])
        self.wait()
        return [[*row[:count], *found] for row, found in zip(rows, of_tables, strict=True)]

    @override
    @torch.no_grad()
    def write(self, rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None, tasks: Tasks = ()) -> None:
        count = len(self.local_pieces)
        if self._dense:
            of_dense = None if groups is None else [groups[k] for k in self._dense]
            self._shards.write([row[:count] for row in rows], weights, of_dense, tasks)
        of_pieces = None if groups is None else [groups[k] for k in self.places]
        reached = [j for j in range(count, len(self.places)) if any(row[j] is not None for row in rows)]
        update: Row = [None] * len(self._tables)
        for j, grad in zip(reached, combined(reached, rows, weights, of_pieces) if reached else [], strict=True):
            update[j - count] = grad
        (whole,) = self._table_rows.gather([update])
        for k, grad in zip(self._tables, whole, strict=True):
            if grad is not None:
                self.params[k].grad = grad


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of the tensors of each dtype."""
    places: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.dtype, []).append(place)
    return list(places.values())


def _taken_apart(
    places: Sequence[int], like: Sequence[Tensor], got: Sequence[Tensor], sizes: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """Return by place what the processes have sent, each its rows of one tensor after the other's."""
    parts: list[list[Tensor]] = [[] for _ in places]
    for r, flat in enumerate(got):
        widths = [math.prod(tensor.shape[1:]) for tensor in like]
        pieces = flat.split([sizes[k][r] * width for k, width in zip(places, widths, strict=True)])
        for part, piece, tensor, k in zip(parts, pieces, like, places, strict=True):
            part.append(piece.reshape(sizes[k][r], *tensor.shape[1:]))
    return {k: torch.cat(part) for k, part in zip(places, parts, strict=True)}


def _chunks(values: list[T], width: int) -> list[list[T]]:
    """Return consecutive parts of a list."""
    return [values[begin : begin + width] for begin in range(0, len(values), width)]
