"""Where the parameters are: whole in every process, or in shards; and how the processes then exchange gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from fastmtl.distributed.comm import DataParallel, ExactDataParallel, ShardedDataParallel
from fastmtl.distributed.peers import Peers, find_peers
from fastmtl.engine.comm import Comm, Local
from fastmtl.engine.losses import Problem
from fastmtl.support.kinds import State

if TYPE_CHECKING:
    from fastmtl.distributed.sharded import ShardedModel

__all__ = ["Storage", "Whole", "broadcast_model", "comm_of_loop", "make_comm", "make_storage"]

Storage: TypeAlias = "Whole | ShardedModel"


class Whole:
    """Every process has all parameters.

    Args:
        model: The model.

    Attributes:
        trained: What the optimizer works on, in the order of the model's parameters.
        kept: Parameters that every process keeps whole.
    """

    is_sharded = False

    def __init__(self, model: nn.Module) -> None:
        self.trained = list(model.parameters())
        self.kept = self.trained

    def whole_state(self, state: State) -> State:
        """Return a ``state_dict`` as it is: that of a process is whole, and fits the model or the optimizer."""
        return state

    def updated(self, params: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Return what the optimizer updates in the place of parameters of the model."""
        return params

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Learn in what order an optimizer has the parameters."""

    load_shards = whole_optimizer = part_optimizer = whole_state


def make_storage(model: nn.Module, peers: Peers, strategy_params: Sequence[nn.Parameter], shard: str) -> Storage:
    """Return where the parameters are; with ``shard="fsdp"`` and several processes they are cut now.

    Args:
        model: With the same parameters in every process.
        peers: The processes.
        strategy_params: Parameters of the strategy, which every process keeps whole.
        shard: ``"none"`` or ``"fsdp"``.
    """
    if shard == "none" or peers.size == 1:
        return Whole(model)
    from fastmtl.distributed.sharded import ShardedModel

    return ShardedModel(model, peers, strategy_params)


@torch.no_grad()
def broadcast_model(model: nn.Module, peers: Peers) -> None:
    """Let the parameters and buffers of all processes be the main one's, each in memory of its own.

    What a process is started with, as by ``torch.multiprocessing.spawn``, is memory that all would write to.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors if peers.size > 1 else ():
        if tensor.device.type == "cpu" and tensor.is_shared():
            tensor.data = tensor.clone()
    peers.broadcast(tensors)


def make_comm(peers: Peers, problem: Problem, storage: Storage, exact: bool) -> Comm:
    """Return what the engine asks of the other processes.

    Args:
        peers: The processes.
        problem: The model and its losses.
        storage: Where the parameters are.
        exact: Whether rows are summed over the processes.
    """
    shared, task_params = problem.shared_params, problem.task_params
    if peers.size == 1:
        return Local(shared, list(problem.model.parameters()))
    if not isinstance(storage, Whole):
        return ShardedDataParallel(storage, shared, task_params, problem.strategy_params)
    kind = ExactDataParallel if exact else DataParallel
    return kind(peers, shared, task_params, problem.strategy_params)


def comm_of_loop(shared: Sequence[Tensor]) -> Comm:
    """Return what a loop of the user's own asks of the processes of torch's default group."""
    peers = find_peers()
    return Local(shared, shared) if peers is None else ExactDataParallel(peers, shared, [])
