"""Several processes as the engine sees them, each with a shard of the parameters (FSDP2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import override

from fastmtl.distributed.comm import ExactDataParallel
from fastmtl.distributed.gradient_shards import GradientShards
from fastmtl.distributed.sharded import ShardedModel
from fastmtl.engine.model import Tasks
from fastmtl.engine.vjp import Cotangents
from fastmtl.engine.weights import Row

__all__ = ["ShardedDataParallel"]


class ShardedDataParallel(ExactDataParallel):
    """Gradients end in the shards of the parameters.

    Args:
        model: The parameters, gathered.
        shared: The shared parameters.
        own: The task-specific parameters.
        of_strategy: The parameters of the strategy, which every process has whole.
    """

    shards: GradientShards

    def __init__(
        self,
        model: ShardedModel,
        shared: Sequence[nn.Parameter],
        own: Sequence[nn.Parameter],
        of_strategy: Sequence[nn.Parameter] = (),
    ) -> None:
        # What is left to all-reduce are parameters that every process has whole.
        kept = [param for param in own if param not in model.shard_of]
        super().__init__(model.peers, [], kept, of_strategy, GradientShards(shared, own, model))
        self.model = model

    @override
    def unshard(self) -> None:
        self.model.gather()

    @override
    def reshard(self) -> None:
        self.model.free()

    @override
    def row(
        self,
        outputs: Sequence[Tensor],
        cotangents: Cotangents,
        own: Sequence[Tensor],
        retain: bool,
        complete: bool,
    ) -> tuple[Row, Row]:
        # The pieces arrive with the backward pass.
        return self.shards.stream(outputs, cotangents, own, retain)

    @override
    def _reduce_own(self, tasks: Tasks) -> None:
        self.shards.reduce()
        super()._reduce_own(tasks)

    @override
    def reduce(self, tasks: Tasks) -> None:
        self._reduce_own(tasks)

    @override
    def put(self, params: Sequence[Tensor], grads: Row) -> None:
        for param, grad in zip(params, grads, strict=True):
            shard = self.model.shard_of.get(param)
            if shard is None:
                param.grad = grad
            else:
                shard.grad = None if grad is None else self.model.part(grad, shard.shape)

    @override
    def clip(self, max_norm: float | Tensor, shared_only: bool) -> None:
        self.shards.clip(max_norm, shared_only, [] if shared_only else self.params)
