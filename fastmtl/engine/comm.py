"""What depends on where batches and parameters are: other processes may have parts of both, or there is one alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.engine.hidden import VJP
from fastmtl.engine.model import Tasks
from fastmtl.engine.vjp import Cotangents, vjp
from fastmtl.engine.weights import Row, Rows
from fastmtl.support.profiling import part

__all__ = ["Combination", "Comm", "Local", "MaskReps"]

# Masks the gradients of T representations, from losses, representations and gradients.
MaskReps = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


class CutsRows(Protocol):
    """Numbers of the shape of the rows, see :class:`fastmtl.weighting.row_state.RowState`."""

    def cut(self, shapes: Sequence[torch.Size]) -> None:
        """Start anew with rows in the shapes of the pieces that this process has of each."""


class Combination:
    """Writes weighted sums of rows into ``.grad`` of the shared parameters, in memory kept from step to step."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self._update: list[Tensor] | None = None

    def write(self, rows: Rows, weights: Tensor, groups: Sequence[int] | None) -> None:
        """Write ``sum_t w_t row_t``."""
        if self._update is None:
            self._update = [torch.empty_like(param) for param in self.params]
        # What a strategy remembers may be of parameters that have been frozen since.
        used = [
            k for k, param in enumerate(self.params) if param.requires_grad and any(row[k] is not None for row in rows)
        ]
        out = [self._update[k] for k in used]
        some = None if groups is None else [groups[k] for k in used]
        if some is not None:
            weights = weights[: max(some, default=-1) + 1]
        with part("combine"):
            ops.combine_(out, [[row[k] for k in used] for row in rows], weights, some)
        for k, grad in zip(used, out, strict=True):
            self.params[k].grad = grad


class Comm:
    """The processes that train together; what the methods do here is what one alone does.

    Each loss, a mean over this process's part of a batch, is multiplied by the part's share of the labels before it is
    differentiated; sums over the processes are then those of one process with the whole batch.

    Args:
        shared: The shared parameters.
        params: All parameters.

    Attributes:
        size: Number of processes.
        shares_batches: Whether other processes have parts of a batch.
        shards_rows: Whether this process has pieces of the rows, and of what a strategy keeps of their size.
    """

    size: int = 1
    shares_batches: ClassVar[bool] = False
    shards_rows: ClassVar[bool] = False

    def __init__(self, shared: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self.shared = shared
        self.params = params
        self.combination = Combination(shared)

    def agree_on_tasks(self, present: Sequence[int] | None, drawn: Sequence[int] | None, count: int) -> list[int]:
        """Return the tasks of this step: those with labels in any process, of those the main process has drawn.

        Args:
            present: The tasks that have labels here, all if None.
            drawn: What the main process has drawn, all if None; not looked at elsewhere.
            count: Number of tasks T.
        """
        here = range(count) if present is None else present
        return [task for task in here if drawn is None or task in drawn]

    def unshard(self) -> None:
        """Make sure that the model has whole parameters."""

    def reshard(self) -> None:
        """Free what of whole parameters this process need not keep."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes; it may be written into."""
        return tensor

    def all_reduce_coalesced(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors over the processes."""
        return list(tensors)

    def mean(self, losses: Tensor, share: Tensor | None) -> Tensor:
        """Return the losses (T,) of all parts of a batch, from those of this part and its share in the step's."""
        return losses if share is None else (losses * share).to(losses.dtype)

    def row(
        self,
        outputs: Sequence[Tensor],
        cotangents: Cotangents,
        task_params: Sequence[Tensor],
        retain: bool,
        final: bool,
        differentiate: VJP | None = None,
    ) -> tuple[Row, Row]:
        """Run a VJP; return what stands for the row of the shared parameters, and the gradients of ``task_params``.

        Args:
            outputs: What to differentiate.
            cotangents: Its cotangents.
            task_params: Further parameters to differentiate with respect to.
            retain: Keep the graph.
            final: Nothing will be added to the row: it is sent.
            differentiate: What computes the VJP, if not ``vjp``.
        """
        grads = (differentiate or vjp)(outputs, cotangents, [*self.shared, *task_params], retain)
        row = grads[: len(self.shared)]
        return self.send(row) if final else row, grads[len(self.shared) :]

    def send(self, row: Row) -> Row:
        """Send a row to the other processes; return what stands for it, which is there once it is collected."""
        return row

    def collect(self, rows: Rows, final: bool) -> Rows:
        """Return the rows of all processes, or this one's pieces of them, once they have arrived."""
        return rows

    def collect_reps(self, rows: Rows) -> Rows:
        """Return the sums over the processes of rows of one small tensor each, such as representations' gradients."""
        return rows

    def all_reduce_row(self, row: Row) -> Row:
        """Return a row over all parameters, None at the same places in all processes, summed over them."""
        return row

    def gram(self, rows: Rows, groups: Sequence[int] | None, shares: Tensor | None) -> Tensor:
        """Return the Gram matrix of collected rows, or what stands for it.

        Args:
            rows: T rows.
            groups: The group of each parameter, or None.
            shares: This process's share in the labels behind each row.
        """
        return ops.gram(rows, groups)

    def broadcast(self, tensors: Iterable[Tensor | None]) -> None:
        """Give all processes the main process's: random numbers, and the last bits of solvers, may differ."""

    def mask(
        self, mask_reps: MaskReps, losses: Tensor, reps: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Let a strategy that masks by sums over the batch see those of the whole batch."""
        return mask_reps(losses, reps, grads)

    def write_shared(self, rows: Rows, weights: Tensor, groups: Sequence[int] | None, tasks: Tasks) -> None:
        """Fill ``.grad`` of the shared parameters with ``sum_t w_t row_t``; that of the others is summed up too."""
        self.combination.write(rows, weights, groups)

    def all_reduce_grads(self, tasks: Tasks) -> None:
        """Sum ``.grad`` of all parameters, after a step of these tasks, over the processes."""

    def set_grads(self, params: Sequence[Tensor], grads: Row) -> None:
        """Fill ``.grad`` with whole gradients that all processes have."""
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    def clip_grad_norm(self, max_norm: float | Tensor, shared_only: bool) -> None:
        """Scale the gradients, of the shared parameters or of all, to a joint 2-norm of at most ``max_norm``."""
        nn.utils.clip_grad_norm_(self.shared if shared_only else self.params, max_norm)  # type: ignore[arg-type]

    def shard_states(self, states: Iterable[CutsRows]) -> Callable[[Tensor], Tensor] | None:
        """Let numbers as large as the rows become this process's pieces of them; return what sums over the pieces."""
        return None

    def gather_states(self, state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return a ``state_dict`` with whole rows (T, P), for the main process, in the place of pieces."""
        return state

    def local_states(self, state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return a ``state_dict`` with this process's pieces in the place of whole rows (T, P)."""
        return state


class Local(Comm):
    """One process alone."""
