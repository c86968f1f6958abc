"""What a training step asks of the other processes where each has a shard of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastmtl.distributed.comm import Exchange
from fastmtl.distributed.sharded import GradientShards, ShardedModel
from fastmtl.distributed.shards import Row

__all__ = ["ShardedExchange"]


class ShardedExchange(Exchange):
    """Makes the processes' parts of a batch one batch; gradients end in the shards of the parameters.

    Args:
        model: The parameters, gathered.
        shared: The shared parameters.
        own: The task-specific parameters.
        exact: Whether the strategy asks for the gradients of the tasks.
        of_rule: The parameters of the strategy, which every process has whole.
    """

    def __init__(
        self,
        model: ShardedModel,
        shared: Sequence[nn.Parameter],
        own: Sequence[nn.Parameter],
        exact: bool,
        of_rule: Sequence[nn.Parameter] = (),
    ) -> None:
        # What is left to all-reduce are parameters that every process has whole.
        kept = [param for param in own if param not in model.shard_of]
        super().__init__(model.peers, [], kept, exact, of_rule)
        self.model = model
        self._shards: GradientShards = GradientShards(shared, own, model)
        self.stream = self._shards.stream

    def gather(self) -> None:
        """Put whole parameters in the model."""
        self.model.gather()

    def free(self) -> None:
        """Free the whole parameters."""
        self.model.free()

    def send(self, row: Row) -> Row:
        """Return a row as it is: its pieces arrived with the backward pass."""
        return row

    def wait(self) -> None:
        """Do nothing: the pieces are there."""

    def put(self, params: Sequence[nn.Parameter], grads: Row) -> None:
        """Fill ``.grad`` of the shards with this process's parts of whole gradients that all processes have."""
        for param, grad in zip(params, grads, strict=True):
            shard = self.model.shard_of.get(param)
            if shard is None:
                param.grad = grad
            else:
                shard.grad = None if grad is None else self.model.part(grad, shard.shape)

    def reduce(self, own_only: bool = False) -> None:
        """Sum gradients over the processes into those of the shards."""
        self._shards.reduce()
        super().reduce(own_only)

    def clip(self, params: Sequence[nn.Parameter] | None, max_norm: Any) -> None:
        """Bring the norm of the gradients down, of all parameters or, if some are given, of the shared ones."""
        self._shards.clip(max_norm, params is not None, [*self.own, *self.of_rule] if params is None else [])
