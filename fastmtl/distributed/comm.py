"""What a training step asks of the other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.distributed.peers import Peers
from fastmtl.distributed.shards import Row, Shards, check_used
from fastmtl.weighting import AbsWeighting, Weights

if TYPE_CHECKING:
    from fastmtl.distributed.sharded import GradientShards

__all__ = ["Exchange"]


class Exchange:
    """Makes the processes' parts of a batch one batch.

    Each loss, a mean over its part, is multiplied by the part's share of the rows before it is differentiated; sums
    over the processes are then those of one process with the whole batch.

    Args:
        peers: The processes.
        shared: The shared parameters.
        own: The task-specific parameters.
        exact: Weights from the Gram matrix of the whole batch's gradients; otherwise from the mean over the processes
            of the Gram matrices of their own parts, so that no row leaves its process.
        of_rule: The parameters of the strategy, whose gradients all processes have.

    Attributes:
        share: This process's share in the labels behind each row: (T,), or (samples T,).
        stream: What takes the place of the VJPs of shared parameters; see :class:`fastmtl.engine.methods.routes.Route`.
    """

    stream: Callable[..., tuple[Row, Row]] | None = None

    def __init__(
        self,
        peers: Peers,
        shared: Sequence[nn.Parameter],
        own: Sequence[nn.Parameter],
        exact: bool = True,
        of_rule: Sequence[nn.Parameter] = (),
    ) -> None:
        self.peers = peers
        self.own = own
        self.of_rule = of_rule
        self.params = [*shared, *own]
        self.exact = exact
        self.share: Tensor | None = None
        self._shards: Shards | GradientShards | None = Shards(shared, peers) if exact and shared else None
        self._tasks: tuple[int, ...] = ()
        self._used: dict[tuple[bool, tuple[int, ...]], list[bool]] = {}

    def gather(self) -> None:
        """Make sure that the model has whole parameters."""

    def free(self) -> None:
        """Let go of what whole parameters this process need not keep."""

    def clip(self, params: Sequence[nn.Parameter] | None, max_norm: Any) -> None:
        """Bring the norm of the gradients of some parameters together, all if None, down to ``max_norm``."""
        nn.utils.clip_grad_norm_([*self.params, *self.of_rule] if params is None else params, max_norm)

    def cut_states(self, rule: AbsWeighting) -> None:
        """Let a strategy that keeps something as large as the rows keep this process's pieces of it."""
        if self._shards is not None and rule.row_states:
            rule.sum_parts = self.peers.sum_
            for state in rule.row_states.values():
                state.cut(self._shards.shapes)

    def whole_states(self, state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return a ``state_dict`` with whole rows (T, P), for the leading process, in the place of pieces."""
        if self._shards is None:
            return state
        found = {name: [self._shards.whole_of(row) for row in state[name]] for name in names}
        return state | {
            name: torch.stack([row for row in rows if row is not None])
            for name, rows in found.items()
            if self.peers.leads
        }

    def part_states(self, state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return a ``state_dict`` with this process's pieces in the place of whole rows (T, P)."""
        if self._shards is None:
            return state
        parts = self._shards.part_of
        return state | {name: torch.stack([parts(row) for row in state[name]]) for name in names if name in state}

    def agree_on_tasks(
        self, present: Sequence[int] | None, drawn: Sequence[int] | None, count: int
    ) -> list[int] | None:
        """Return the tasks of this step: those with labels in any process, of those the leading process has drawn.

        Args:
            present: The tasks that have labels here, all if None.
            drawn: What the leading process has drawn, all if None; not looked at elsewhere.
            count: Number of tasks T.

        Returns:
            The tasks in order, None for all.
        """
        here = set(range(count) if present is None else present)
        chosen = set(range(count) if drawn is None else drawn) if self.peers.leads else set()
        flags = self.peers.any_([t in here for t in range(count)] + [t in chosen for t in range(count)])
        tasks = [t for t in range(count) if flags[t] and flags[count + t]]
        self._tasks = tuple(tasks)
        return None if len(tasks) == count else tasks

    def mean(self, losses: Tensor, share: Tensor) -> Tensor:
        """Return the losses (T,) of all parts of a batch, from those of this part and its share in them."""
        return self.peers.sum_(losses.to(share.dtype) * share).to(losses.dtype)

    def send(self, row: Row) -> Row:
        """Begin to sum a row over the processes; see :meth:`Shards.send`."""
        assert isinstance(self._shards, Shards)
        return self._shards.send(row)

    def wait(self) -> None:
        """Wait for the rows that were sent."""
        assert isinstance(self._shards, Shards)
        self._shards.wait()

    def whole_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows of one small tensor each, such as representations' gradients, summed over the processes."""
        stacked = torch.stack([row[0] for row in rows if row[0] is not None])
        return [[row] for row in self.peers.sum_(stacked)]

    def whole_row(self, row: Row) -> Row:
        """Return a row over all parameters, None at the same places in all processes, summed over them."""
        found = iter(self.peers.sums([grad for grad in row if grad is not None]))
        return [None if grad is None else next(found) for grad in row]

    def put(self, params: Sequence[nn.Parameter], grads: Row) -> None:
        """Fill ``.grad`` with whole gradients that all processes have."""
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    def gram(self, rows: Sequence[Row], groups: Sequence[int] | None) -> Tensor:
        """Return the Gram matrix of the whole batch, or what stands for it; rows are pieces if it is to be exact."""
        if self._shards is not None:
            return self._shards.gram(rows, groups)
        assert self.share is not None
        gram = ops.gram(rows, groups)
        # The rows carry their share, of which a mean of Gram matrices takes one in place of two.
        scale = self.share.where(self.share > 0, torch.inf).rsqrt().to(gram.dtype)
        return self.peers.sum_(gram * scale[:, None] * scale)

    def agree(self, weights: Weights) -> None:
        """Give all processes the leader's weights: random numbers, and the last bits of solvers, may differ."""
        self.peers.from_leader([weights.shared] if weights.heads is None else [weights.shared, weights.heads])

    def write_shared(self, rows: Sequence[Row], weights: Tensor, groups: Sequence[int] | None) -> None:
        """Fill ``.grad`` of the shared parameters from pieces, and sum that of the others over the processes."""
        assert self._shards is not None
        self._shards.write(rows, weights, groups, self._tasks)
        self.reduce(own_only=True)
        for param in self.params:
            # Some may have been frozen since the first step.
            param.grad = param.grad if param.requires_grad else None

    @torch.no_grad()
    def reduce(self, own_only: bool = False) -> None:
        """Sum ``.grad`` of all parameters, or of the task-specific ones, over the processes.

        Which of them have one in any process is learned in the first step of the same tasks; see :func:`check_used`.
        """
        params = self.own if own_only else self.params
        if not params:
            return
        key = own_only, self._tasks
        has_grad = [param.grad is not None for param in params]
        if key not in self._used:
            self._used[key] = self.peers.any_(has_grad)
        check_used(params, has_grad, self._used[key])
        used = [param for param, is_used in zip(params, self._used[key], strict=True) if is_used]
        sums = self.peers.sums([torch.zeros_like(param) if param.grad is None else param.grad for param in used])
        for param, grad in zip(used, sums, strict=True):
            param.grad = grad if param.requires_grad else None

    def mask(
        self,
        mask_reps: Callable[..., Sequence[Tensor]],
        losses: Tensor,
        reps: Sequence[Tensor],
        grads: Sequence[Tensor],
    ) -> list[Tensor]:
        """Let a strategy that masks by sums over the batch see those of the whole batch.

        One row more, of representation 1, holds what the sums of the other parts add to this one's.
        """
        signed = torch.stack([(grad * rep.sign()).sum(0) for rep, grad in zip(reps, grads, strict=True)])
        rest = self.peers.sum_(signed.clone()) - signed
        longer = {id(rep): torch.cat([rep, torch.ones_like(rep[:1])]) for rep in reps}
        more = [torch.cat([grad, each[None]]) for grad, each in zip(grads, rest, strict=True)]
        return [each[:-1] for each in mask_reps(losses, [longer[id(rep)] for rep in reps], more)]
