"""The interface to other processes, which may have parts of each batch and of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.engine.gradients import clip_grads
from fastmtl.engine.hidden import VJP
from fastmtl.engine.model import Tasks
from fastmtl.engine.vjp import Cotangents, vjp
from fastmtl.engine.weights import Row, Rows
from fastmtl.support.dtypes import wide_dtype
from fastmtl.support.profiling import part

__all__ = ["Combination", "Comm", "Local", "MaskReps", "combine_into", "combined"]

T = TypeVar("T")

# Masks the gradients of T representations, from losses, representations and gradients.
MaskReps = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


class RowShapedState(Protocol):
    """State with the shape of the rows, see :class:`fastmtl.weighting.row_state.RowState`."""

    def cut(self, shapes: Sequence[torch.Size]) -> None:
        """Reset the state to rows with the shapes of this process's pieces."""


class Combination:
    """Writes weighted sums of rows into ``.grad`` of the shared parameters, in memory reused in every step.

    Where all rows of a parameter are sparse, so is the sum, in memory of its own.

    Attributes:
        params: The shared parameters.
        dense: Those whose sum is dense even so.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.dense: set[Tensor] = set()
        self._update: Row = [None] * len(params)

    def write(self, rows: Rows, weights: Tensor, groups: Sequence[int] | None) -> None:
        """Write ``sum_t w_t row_t``."""
        # The state of a strategy may hold rows of parameters that have been frozen since.
        used = [param.requires_grad and any(row[k] is not None for row in rows) for k, param in enumerate(self.params)]
        sparse = [is_used and self._has_sparse_sum(rows, k) for k, is_used in enumerate(used)]
        for k, param in enumerate(self.params):
            if self._update[k] is None and not sparse[k]:
                self._update[k] = torch.empty_like(param)
        out = [
            update if is_used and not is_sparse else None
            for update, is_used, is_sparse in zip(self._update, used, sparse, strict=True)
        ]
        with part("combine"):
            combine_into(out, rows, weights, groups)
            if any(sparse):
                sums = iter(combined([k for k, is_sparse in enumerate(sparse) if is_sparse], rows, weights, groups))
                out = [next(sums) if is_sparse else grad for is_sparse, grad in zip(sparse, out, strict=True)]
        for param, grad in zip(self.params, out, strict=True):
            if grad is not None:
                param.grad = grad

    def _has_sparse_sum(self, rows: Rows, k: int) -> bool:
        column = [row[k] for row in rows]
        is_sparse = all(entry is None or entry.is_sparse for entry in column)
        return is_sparse and self.params[k] not in self.dense


def combined(some: Sequence[int], rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None) -> Row:
    """Return ``sum_t w_t row_t`` of some parameters, in new memory."""
    groups = None if groups is None else [groups[k] for k in some]
    if groups is not None:
        weights = weights[: max(groups, default=-1) + 1]
    return cast(Row, ops.combine([[row[k] for k in some] for row in rows], weights, groups))


def combine_into(out: Row, rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None) -> None:
    """Fill the tensors of ``out`` with ``sum_t w_t row_t``, by the weights (L, T) of their groups if there are any."""
    used = [k for k, tensor in enumerate(out) if tensor is not None]
    groups = None if groups is None else [groups[k] for k in used]
    if groups is not None:
        weights = weights[: max(groups, default=-1) + 1]
    filled = [tensor for tensor in out if tensor is not None]
    ops.combine_(filled, [[row[k] for k in used] for row in rows], weights, groups)


class Comm:
    """The processes that train together; the methods here do what is right for a single process.

    Each loss, a mean over this process's part of a batch, is multiplied by the part's share of the labels before it is
    differentiated; sums over the processes are then what one process computes for the whole batch.

    Args:
        shared: The shared parameters.
        params: All parameters.

    Attributes:
        size: Number of processes.
        shares_batches: Whether other processes have parts of a batch.
        shards_rows: Whether this process has pieces of the rows, and of a strategy's state of their size.
        tables: Parameters with sparse gradients, of which touched rows are exchanged.
    """

    size: int = 1
    shares_batches: ClassVar[bool] = False
    shards_rows: ClassVar[bool] = False
    tables: Collection[Tensor] = ()

    def __init__(self, shared: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self.shared = shared
        self.params = params
        self.combination = Combination(shared)

    def of_block(self, params: Sequence[Tensor]) -> Comm:
        """Return the communicator of some of the shared parameters, whose rows come and are written apart."""
        return Local(params, params)

    def agree_on_tasks(self, present: Sequence[int] | None, drawn: Sequence[int] | None, count: int) -> list[int]:
        """Return the tasks of this step: those with labels in any process that the main process has drawn.

        ``present`` are the tasks with labels here, ``drawn`` those that the main process has drawn, which is ignored
        in other processes; None means all ``count`` tasks.
        """
        here = range(count) if present is None else present
        return [task for task in here if drawn is None or task in drawn]

    def unshard(self) -> None:
        """Gather the parameters, if they are sharded."""

    def reshard(self) -> None:
        """Free the gathered parameters, keeping this process's shards."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes; may overwrite it."""
        return tensor

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Return which flags are set in any process."""
        return list(flags)

    def of_main(self, value: T) -> T:
        """Return the main process's picklable value."""
        return value

    def check_alike(self, params: Sequence[Tensor]) -> None:
        """Refuse parameters that are others, or in another order, in other processes.

        Raises:
            UsageError: They are.
        """

    def find_tables(self, params: Sequence[Tensor], sparse: Collection[Tensor], dense: Collection[Tensor]) -> None:
        """Find out which parameters are tables: those with ``sparse`` gradients in some process, ``dense`` in none."""

    def any_shard(self, flag: Tensor) -> Tensor:
        """Return a scalar flag of the gradients that are written, 1 if it is in any process; may overwrite it."""
        return flag

    def all_reduce_coalesced(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of several tensors over the processes."""
        return list(tensors)

    def all_reduce_jacobians(self, jacobians: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over the processes of the Jacobians (T, ...) of some parameters."""
        return list(jacobians)

    def mean(self, losses: Tensor, share: Tensor | None) -> Tensor:
        """Return the losses (T,) of all parts of a batch, from those of this part and its share (T,)."""
        return losses if share is None else (losses * share).to(losses.dtype)

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
        """Run a VJP; return the row of the shared parameters, or its handle, and the gradients of ``task_params``.

        Args:
            outputs: What to differentiate.
            cotangents: One per output.
            task_params: Further parameters to differentiate with respect to.
            retain: Keep the graph.
            final: No other batch's row will be added to this one: it is sent.
            differentiate: Computes the VJP in place of ``vjp``.
            reached: The places of the shared parameters that the outputs depend on; all of them if None.
        """
        shared = self.shared if reached is None else [self.shared[place] for place in reached]
        grads = (differentiate or vjp)(outputs, cotangents, [*shared, *task_params], retain)
        row, own = grads[: len(shared)], grads[len(shared) :]
        if reached is not None:
            found, row = row, [None] * len(self.shared)
            for place, grad in zip(reached, found, strict=True):
                row[place] = grad
        return self.send(row) if final else row, own

    def send(self, row: Row) -> Row:
        """Start to reduce a row over the processes; return a handle, which :meth:`collect` takes."""
        return row

    def collect(self, rows: Rows, final: bool) -> Rows:
        """Wait for the reduced rows; return them, or this process's pieces of them."""
        return rows

    def collect_reps(self, rows: Rows) -> Rows:
        """Return the sums over the processes of rows of one small tensor each, such as gradients of representations."""
        return rows

    def all_reduce_row(self, row: Row, params: Sequence[Tensor]) -> Row:
        """Return the sum over the processes of a row over some parameters.

        What is no table has a gradient in all processes or in none.
        """
        return row

    def all_reduce_rows(self, rows: Rows, shapes: Sequence[Sequence[int]], tasks: Tasks) -> Rows:
        """Return the sums over the processes of the rows of these tasks, whole in each.

        An entry is of the given shape, or None where the task does not reach the parameter in this process.
        """
        return rows

    def gram(self, rows: Rows, groups: Sequence[int] | None, shares: Tensor | None) -> Tensor:
        """Return the Gram matrix (T, T) of T collected rows, or the estimate of it that this communicator uses.

        ``groups`` holds the group of each parameter, for (L, T, T); ``shares`` (T,) are this process's shares of the
        labels behind each row.
        """
        return self._gram(rows, groups)

    def _gram(self, rows: Rows, groups: Sequence[int] | None) -> Tensor:
        """Return the Gram matrix of this process's rows, zeros where they have no entry."""
        if not self.shared or any(entry is not None for row in rows for entry in row):
            return ops.gram(rows, groups)
        device = self.shared[0].device
        shape = (len(rows), len(rows)) if groups is None else (max(groups) + 1, len(rows), len(rows))
        return torch.zeros(shape, dtype=wide_dtype(device), device=device)

    def broadcast(self, tensors: Iterable[Tensor | None]) -> None:
        """Overwrite tensors with the main process's: random numbers, and the last bits of solvers, may differ."""

    def mask(
        self, mask_reps: MaskReps, losses: Tensor, reps: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the masked gradients, by sums over the whole batch in all processes."""
        return mask_reps(losses, reps, grads)

    def write_shared(self, rows: Rows, weights: Tensor, groups: Sequence[int] | None, tasks: Tasks) -> None:
        """Fill ``.grad`` of the shared parameters with ``sum_t w_t row_t``, and all-reduce that of the others."""
        self.combination.write(rows, weights, groups)

    def start_write(
        self, rows: Rows, weights: Tensor, groups: Sequence[int] | None, tasks: Tasks
    ) -> Callable[[], object]:
        """Start :meth:`write_shared`; return a function that waits until ``.grad`` has its values."""
        self.write_shared(rows, weights, groups, tasks)
        return lambda: None

    def all_reduce_grads(self, tasks: Tasks, summed: Sequence[Tensor] = ()) -> None:
        """All-reduce ``.grad`` of all parameters but those of ``summed`` after a step of these tasks."""

    def all_reduce_others(self, params: Sequence[Tensor]) -> None:
        """All-reduce ``.grad`` of parameters that are not among this communicator's own."""

    def set_grads(self, params: Sequence[Tensor], grads: Row) -> None:
        """Fill ``.grad`` with gradients that are equal in all processes."""
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    def clip_grad_norm(self, max_norm: float | Tensor, shared_only: bool) -> None:
        """Scale the gradients, of the shared parameters or of all, to a total 2-norm of at most ``max_norm``."""
        clip_grads(self.shared if shared_only else self.params, max_norm)

    def shard_states(self, states: Iterable[RowShapedState]) -> Callable[[Tensor], Tensor] | None:
        """Shard state of the size of the rows; return a function that sums over the shards, None without."""
        return None

    def gather_states(self, state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return a ``state_dict`` in which whole rows (T, P) replace the pieces; complete in the main process."""
        return state

    def local_states(self, state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return a ``state_dict`` in which this process's pieces replace whole rows (T, P)."""
        return state


class Local(Comm):
    """A single process."""
