"""Where the parameters are stored, whole or sharded, and the communicator that goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn

from fastmtl.distributed.comm import DataParallel, ExactDataParallel, ShardedDataParallel
from fastmtl.distributed.peers import Peers, find_peers
from fastmtl.engine.comm import Comm, Local
from fastmtl.engine.losses import Problem
from fastmtl.engine.tables import sparse_tables
from fastmtl.support.kinds import State

if TYPE_CHECKING:
    from fastmtl.distributed.sharded import ShardedModel

__all__ = ["Storage", "Whole", "broadcast_model", "comm_of_loop", "make_comm", "make_storage"]

Storage: TypeAlias = "Whole | ShardedModel"


class Whole:
    """Every process has all parameters; the interface is that of ``ShardedModel``."""

    is_sharded = False

    def __init__(self, model: nn.Module) -> None:
        self.trained = list(model.parameters())
        self.kept = self.trained

    def whole_state(self, state: State) -> State:
        """Return a ``state_dict``, of model or optimizer, unchanged."""
        return state

    def updated(self, params: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Return the tensors that the optimizer updates for some parameters: the parameters."""
        return params

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: no state depends on the optimizer's order."""

    load_shards = whole_optimizer = part_optimizer = whole_state


def make_storage(model: nn.Module, peers: Peers, strategy_params: Sequence[nn.Parameter], shard: str) -> Storage:
    """Return the storage of a model whose parameters are equal in all processes.

    With ``shard="fsdp"`` and several processes it shards them now, but for those of the strategy.
    """
    if shard == "none" or peers.size == 1:
        return Whole(model)
    from fastmtl.distributed.sharded import ShardedModel

    return ShardedModel(model, peers, strategy_params)


@torch.no_grad()
def broadcast_model(model: nn.Module, peers: Peers) -> None:
    """Broadcast the main process's parameters and buffers, and move them out of shared memory.

    Tensors passed to processes by ``torch.multiprocessing.spawn`` are shared: all processes would write to them.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors if peers.size > 1 else ():
        if tensor.device.type == "cpu" and tensor.is_shared():
            tensor.data = tensor.clone()
    peers.broadcast(tensors)


def make_comm(peers: Peers, problem: Problem, storage: Storage, exact: bool) -> Comm:
    """Return the engine's communicator; ``exact`` sums rows over the processes where parameters are not sharded."""
    shared, task_params = problem.shared_params, problem.task_params
    if peers.size == 1:
        return Local(shared, list(problem.model.parameters()))
    if not isinstance(storage, Whole):
        return ShardedDataParallel(storage, shared, task_params, problem.strategy_params)
    kind = ExactDataParallel if exact else DataParallel
    named = dict(problem.model.named_parameters())
    tables = [named[name] for name in sparse_tables(cast(nn.Module, problem.model))]
    return kind(peers, shared, task_params, problem.strategy_params, tables)


def comm_of_loop(shared: Sequence[Tensor]) -> Comm:
    """Return the communicator of a user's training loop, for the processes of torch's default group."""
    peers = find_peers()
    return Local(shared, shared) if peers is None else ExactDataParallel(peers, shared, [])
