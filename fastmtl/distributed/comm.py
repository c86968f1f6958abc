"""The engine's interface to several processes, each with a part of every batch, and all parameters or a shard."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from fastmtl.distributed.gradient_shards import BlockShards, GradientShards
from fastmtl.distributed.peers import Peers
from fastmtl.distributed.shards import Pieces, Shards, UsedParams, refuse_sparse
from fastmtl.distributed.table_rows import TableRows, TableShards
from fastmtl.engine.comm import Comm, MaskReps, RowShapedState
from fastmtl.engine.hidden import VJP
from fastmtl.engine.model import Tasks
from fastmtl.engine.vjp import Cotangents
from fastmtl.engine.weights import Row, Rows
from fastmtl.errors import UsageError

if TYPE_CHECKING:
    from fastmtl.distributed.sharded import ShardedModel

__all__ = ["DataParallel", "ExactDataParallel", "ShardedDataParallel"]

T = TypeVar("T")


class DataParallel(Comm):
    """Rows stay in their process: the Gram matrix is the mean of those of the processes' parts of the batch.

    The gradients of ``strategy_params``, the strategy's parameters, are equal in all processes. Those of ``tables`` are
    sparse.
    """

    shares_batches = True

    def __init__(
        self,
        peers: Peers,
        shared: Sequence[Tensor],
        task_params: Sequence[Tensor],
        strategy_params: Sequence[Tensor] = (),
        tables: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(shared, [*shared, *task_params, *strategy_params])
        self.tables: Collection[Tensor] = set(tables)
        self.peers = peers
        self.size = peers.size
        self.task_params = task_params
        self._used_params = UsedParams(peers)

    @override
    def of_block(self, params: Sequence[Tensor]) -> DataParallel:
        return DataParallel(self.peers, params, [])

    @override
    def agree_on_tasks(self, present: Sequence[int] | None, drawn: Sequence[int] | None, count: int) -> list[int]:
        here = set(range(count) if present is None else present)
        chosen = set(range(count) if drawn is None else drawn) if self.peers.is_main_process else set()
        flags = self.peers.all_reduce_any([t in here for t in range(count)] + [t in chosen for t in range(count)])
        return [t for t in range(count) if flags[t] and flags[count + t]]

    @override
    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.peers.all_reduce(tensor)

    @override
    def any(self, flags: Sequence[bool]) -> list[bool]:
        return self.peers.all_reduce_any(list(flags))

    @override
    def of_main(self, value: T) -> T:
        return self.peers.all_gather_object(value)[0]

    @override
    @torch.no_grad()
    def check_alike(self, params: Sequence[Tensor]) -> None:
        # Equal parameters have equal norms; the sine tells places apart.
        norms = torch.stack([norm.double() for norm in torch._foreach_norm([param.detach() for param in params])])
        place = torch.arange(1, len(norms) + 1, dtype=norms.dtype, device=norms.device)
        marks = norms.new_zeros(self.size, 3)
        marks[self.peers.rank] = torch.stack([place[-1], norms.sum(), (norms * place.sin()).sum()])
        marks = self.peers.all_reduce(marks)
        if not torch.allclose(marks, marks[:1].expand_as(marks), rtol=1e-6, atol=0, equal_nan=True):
            raise UsageError(
                "The processes' losses depend on other parameters, on others in this order, or on parameters of other "
                "values: start all processes from the same ones, and give shared= the module, or the parameters in the "
                "same order."
            )

    @override
    def find_tables(self, params: Sequence[Tensor], sparse: Collection[Tensor], dense: Collection[Tensor]) -> None:
        flags = self.any([param in sparse for param in params] + [param in dense for param in params])
        is_sparse, is_dense = flags[: len(params)], flags[len(params) :]
        self.tables = {param for param, a, b in zip(params, is_sparse, is_dense, strict=True) if a and not b}

    @override
    def all_reduce_coalesced(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.peers.all_reduce_coalesced(tensors)

    @override
    def all_reduce_jacobians(self, jacobians: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        def row(t: int) -> Row:
            pairs = zip(jacobians, params, strict=True)
            # A table has dense zeros where nothing is looked up in it.
            return [jac[t] if jac.is_sparse or param not in self.tables else None for jac, param in pairs]

        rows = [row(t) for t in range(len(jacobians[0]))]
        sums = self._all_reduce(rows, params, self._sums_of_rows)
        stacked = []
        for column, jac in zip(zip(*sums, strict=True), jacobians, strict=True):
            known = [grad for grad in column if grad is not None]
            if known:
                nothing = torch.zeros_like(known[0])
                jac = torch.stack([nothing if grad is None else grad for grad in column])
            stacked.append(jac)
        return stacked

    @override
    def mean(self, losses: Tensor, share: Tensor | None) -> Tensor:
        assert share is not None
        return self.peers.all_reduce(losses.to(share.dtype) * share).to(losses.dtype)

    @override
    def collect_reps(self, rows: Rows) -> Rows:
        stacked = torch.stack([row[0] for row in rows if row[0] is not None])
        return [[row] for row in self.peers.all_reduce(stacked)]

    @override
    def all_reduce_row(self, row: Row, params: Sequence[Tensor]) -> Row:
        return self._all_reduce([row], params, self._sums_of_rows)[0]

    def _sums_of_rows(self, rows: Rows) -> Rows:
        """Return the sums of dense rows that have None at the same indices in all processes."""
        known = [grad for row in rows for grad in row if grad is not None]
        refuse_sparse(list(known))
        sums = iter(self.peers.all_reduce_coalesced(known))
        return [[None if grad is None else next(sums) for grad in row] for row in rows]

    @override
    def all_reduce_rows(self, rows: Rows, shapes: Sequence[Sequence[int]], tasks: Tasks) -> Rows:
        return self._all_reduce(rows, self.shared, lambda dense: self._all_reduce_dense(dense, shapes, tasks))

    def _all_reduce(self, rows: Rows, params: Sequence[Tensor], of_dense: Callable[[Rows], Rows]) -> Rows:
        """Return the sums of rows over ``params``, by ``of_dense`` where None stands in place of tables."""
        places = [k for k, param in enumerate(params) if param in self.tables]
        of_tables = TableRows([params[k] for k in places], self.peers).all_reduce(
            [[row[k] for k in places] for row in rows]
        )
        sums = of_dense([[None if k in places else grad for k, grad in enumerate(row)] for row in rows])
        for row, found in zip(sums, of_tables, strict=True):
            for k, grad in zip(places, found, strict=True):
                row[k] = grad
        return sums

    def _all_reduce_dense(self, rows: Rows, shapes: Sequence[Sequence[int]], tasks: Tasks) -> Rows:
        params = [param for _ in rows for param in self.shared]
        entries = [entry for row in rows for entry in row]
        refuse_sparse(entries)
        used = self._used_params(params, [entry is not None for entry in entries], ("rows", tasks))
        sent = [
            param.new_zeros(shape) if entry is None else entry.to(param.dtype)
            for param, entry, shape, is_used in zip(params, entries, [*shapes] * len(rows), used, strict=True)
            if is_used
        ]
        sums = iter(self.peers.all_reduce_coalesced(sent))
        flags = iter(used)
        return [[next(sums) if next(flags) else None for _ in row] for row in rows]

    @override
    def gram(self, rows: Rows, groups: Sequence[int] | None, shares: Tensor | None) -> Tensor:
        assert shares is not None
        gram = self._gram(rows, groups)
        # The rows are scaled by their share; the mean of Gram matrices is linear in it.
        scale = shares.where(shares > 0, torch.inf).rsqrt().to(gram.dtype)
        return self.peers.all_reduce(gram * scale[:, None] * scale)

    @override
    def broadcast(self, tensors: Iterable[Tensor | None]) -> None:
        self.peers.broadcast([tensor for tensor in tensors if tensor is not None])

    @override
    def mask(
        self, mask_reps: MaskReps, losses: Tensor, reps: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        # An extra row, with representation 1, holds the sums over the other processes' parts.
        signed = torch.stack([(grad * rep.sign()).sum(0) for rep, grad in zip(reps, grads, strict=True)])
        rest = self.peers.all_reduce(signed.clone()) - signed
        longer = {id(rep): torch.cat([rep, torch.ones_like(rep[:1])]) for rep in reps}
        more = [torch.cat([grad, line[None]]) for grad, line in zip(grads, rest, strict=True)]
        return [masked[:-1] for masked in mask_reps(losses, [longer[id(rep)] for rep in reps], more)]

    @override
    def write_shared(self, rows: Rows, weights: Tensor, groups: Sequence[int] | None, tasks: Tasks) -> None:
        self.combination.write(rows, weights, groups)
        self.all_reduce_grads(tasks)

    @override
    def all_reduce_grads(self, tasks: Tasks, summed: Sequence[Tensor] = ()) -> None:
        done = set(summed)
        self._reduce([param for param in (*self.shared, *self.task_params) if param not in done], tasks)

    @override
    def all_reduce_others(self, params: Sequence[Tensor]) -> None:
        self._reduce(params, ())

    def _reduce(self, params: Sequence[Tensor], tasks: Tasks) -> None:
        """All-reduce ``.grad`` of those parameters that have one in any process."""
        self._reduce_dense([param for param in params if param not in self.tables], tasks)
        tables = [param for param in params if param in self.tables]
        (sums,) = TableRows(tables, self.peers).all_reduce([[param.grad for param in tables]])
        for param, grad in zip(tables, sums, strict=True):
            param.grad = grad if param.requires_grad else None

    @torch.no_grad()
    def _reduce_dense(self, params: Sequence[Tensor], tasks: Tasks) -> None:
        if not params:
            return
        refuse_sparse([param.grad for param in params])
        are_used = self._used_params(params, [param.grad is not None for param in params], (len(params), tasks))
        used = [param for param, is_used in zip(params, are_used, strict=True) if is_used]
        sums = self.peers.all_reduce_coalesced(
            [torch.zeros_like(param) if param.grad is None else param.grad for param in used]
        )
        for param, grad in zip(used, sums, strict=True):
            param.grad = grad if param.requires_grad else None


class ExactDataParallel(DataParallel):
    """Each process has 1/W of the sum of every row: Gram matrix and update are exact for the whole batch."""

    shards_rows = True

    @override
    def of_block(self, params: Sequence[Tensor]) -> ExactDataParallel:
        return ExactDataParallel(self.peers, params, [])

    @cached_property
    def shards(self) -> Pieces:
        """The communicator of rows, created with the first row."""
        if not any(param in self.tables for param in self.shared):
            return Shards(self.shared, self.peers)
        return TableShards(self.shared, self.tables, self.peers)

    @override
    def send(self, row: Row) -> Row:
        return self.shards.send(row)

    @override
    def collect(self, rows: Rows, final: bool) -> Rows:
        # Accumulated rows are sent now.
        rows = rows if final else [self.send(row) for row in rows]
        return self.shards.collect(rows)

    @override
    def gram(self, rows: Rows, groups: Sequence[int] | None, shares: Tensor | None) -> Tensor:
        return self.shards.gram(rows, groups)

    @override
    def write_shared(self, rows: Rows, weights: Tensor, groups: Sequence[int] | None, tasks: Tasks) -> None:
        self.start_write(rows, weights, groups, tasks)()
        self._reduce(self.task_params, tasks)

    @override
    def start_write(
        self, rows: Rows, weights: Tensor, groups: Sequence[int] | None, tasks: Tasks
    ) -> Callable[[], object]:
        self.shards.write(rows, weights, groups, tasks)
        for param in self.shared:
            # Some may have been frozen since the first step.
            param.grad = param.grad if param.requires_grad else None
        return self.shards.wait

    @override
    def shard_states(self, states: Iterable[RowShapedState]) -> Callable[[Tensor], Tensor] | None:
        for state in states:
            state.cut(self.shards.shapes)
        return self.peers.all_reduce

    @override
    def gather_states(self, state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        whole = {name: [self.shards.whole_of(row) for row in state[name]] for name in names}
        return state | {
            name: torch.stack([row for row in rows if row is not None])
            for name, rows in whole.items()
            if self.peers.is_main_process
        }

    @override
    def local_states(self, state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        parts = self.shards.part_of
        return state | {name: torch.stack([parts(row) for row in state[name]]) for name in names if name in state}


class ShardedDataParallel(ExactDataParallel):
    """Each process has a shard of the parameters and gradients (FSDP2), but the strategy's parameters whole."""

    shards: GradientShards

    def __init__(
        self,
        model: ShardedModel,
        shared: Sequence[nn.Parameter],
        task_params: Sequence[nn.Parameter],
        strategy_params: Sequence[nn.Parameter] = (),
    ) -> None:
        # Only parameters that every process has whole are all-reduced.
        super().__init__(
            model.peers, [], [param for param in task_params if param not in model.shard_of], strategy_params
        )
        self.shards = GradientShards(shared, task_params, model)
        self.model = model

    @override
    def of_block(self, params: Sequence[Tensor]) -> ExactDataParallel:
        block = ExactDataParallel(self.peers, params, [])
        block.shards = BlockShards(params, self.model)
        return block

    @override
    def unshard(self) -> None:
        self.model.unshard()

    @override
    def reshard(self) -> None:
        self.model.reshard()

    @override
    def row(
        self,
        outputs: Sequence[Tensor],
        cotangents: Cotangents,
        task_params: Sequence[Tensor],
        retain: bool,
        final: bool,
        differentiate: VJP | None = None,
        reached: Sequence[int] | None = None,
    ) -> tuple[Row, Row]:
        # What is not reached sends nothing, so that `reached` need not be looked at.
        if differentiate is not None:
            raise UsageError(
                "shard must be 'none' for a network with functions that run backward passes of their own, such as "
                "checkpoint(use_reentrant=True)."
            )
        # Hooks send the pieces during the backward pass.
        return self.shards.stream(outputs, cotangents, task_params, retain)

    @override
    def _reduce(self, params: Sequence[Tensor], tasks: Tasks) -> None:
        self.shards.reduce()
        super()._reduce(params, tasks)

    @override
    def set_grads(self, params: Sequence[Tensor], grads: Row) -> None:
        for param, grad in zip(params, grads, strict=True):
            shard = self.model.shard_of.get(param, param)
            shard.grad = grad if grad is None or shard is param else self.model.local_part(grad, shard.shape)

    @override
    def any_shard(self, flag: Tensor) -> Tensor:
        return self.peers.all_reduce(flag).clamp_(max=1)

    @override
    def clip_grad_norm(self, max_norm: float | Tensor, shared_only: bool) -> None:
        self.shards.clip_grad_norm(max_norm, shared_only, [] if shared_only else self.params)
