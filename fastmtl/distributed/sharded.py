"""Parameters sharded over the processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastmtl.distributed.peers import Peers, peer_errors
from fastmtl.errors import UsageError
from fastmtl.support.kinds import State

__all__ = ["ShardedModel"]


class _AllGather:
    """FSDP's all-gather, which says what others do if a process is lost; it has FSDP's interface of one."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for the gathered parameters."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: object, async_op: bool = False) -> None:
        """Fill ``output_tensor`` with all processes' parts; on a GPU the stream waits, not the host."""
        self._peers.all_gather(output_tensor, input_tensor)()


class ShardedModel:
    """A model whose parameters are cut along their first dimension by ``fully_shard``.

    :meth:`unshard` gathers them and :meth:`reshard` frees them. FSDP's gradient reduction is off, as it supports one
    backward pass per step only. The optimizer updates the shards, plain tensors in the memory of FSDP's DTensors.

    Args:
        model: The model, with equal parameters in all processes.
        peers: The processes.
        kept: Parameters that every process keeps whole, such as the strategy's.

    Attributes:
        trained: The tensors that the optimizer updates, in the order of the model's parameters.
        kept: Parameters that every process keeps whole.
        shard_of: The shard of each sharded parameter, by the gathered parameter.

    Raises:
        UsageError: A parameter is not contiguous.
    """

    is_sharded = True

    def __init__(self, model: nn.Module, peers: Peers, kept: Sequence[nn.Parameter]) -> None:
        for name, param in model.named_parameters():
            if not param.is_contiguous():
                raise UsageError(f"shard='fsdp' needs contiguous parameters, and {name} is not: is channels_last on?")
        self.peers = peers
        device = next(model.parameters()).device.type
        # Scalars cannot be sharded.
        whole = {*kept, *(param for param in model.parameters() if not param.dim())}
        with peer_errors():
            mesh = init_device_mesh(device, (peers.size,))
        self._model: Any = fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
        all_gather: Any = _AllGather(Peers(mesh.get_group()))
        self._model.set_custom_all_gather(all_gather)
        self._model.set_requires_gradient_sync(False)
        self._model.set_reshard_after_backward(False)
        shards = {
            name: nn.Parameter(param.to_local().detach(), requires_grad=param.requires_grad)
            for name, param in model.named_parameters()
            if isinstance(param, DTensor)
        }
        self.trained = [shards.get(name, param) for name, param in model.named_parameters()]
        self.kept = [param for param in model.parameters() if param in whole]
        self.unshard()
        gathered = dict(model.named_parameters())
        self.shard_of: dict[Tensor, nn.Parameter] = {gathered[name]: shard for name, shard in shards.items()}
        # The shape of the whole parameter of each shard.
        self._whole_shapes = {shard: param.shape for param, shard in self.shard_of.items()}
        self._shapes = self._in_order(self.trained)

    def updated(self, params: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Return the tensors that the optimizer updates for some gathered parameters."""
        return [self.shard_of.get(param, param) for param in params]

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Adopt the order in which an optimizer holds the parameters."""
        self._shapes = self._in_order([param for group in optimizer.param_groups for param in group["params"]])

    def _in_order(self, params: Sequence[nn.Parameter]) -> dict[int, tuple[torch.Size, torch.Size]]:
        whole = self._whole_shapes
        return {index: (param.shape, whole[param]) for index, param in enumerate(params) if param in whole}

    def unshard(self) -> None:
        """Gather the parameters, unless they are gathered."""
        self._model.unshard()

    def reshard(self) -> None:
        """Free the gathered parameters."""
        self._model.reshard()

    def whole_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a ``state_dict`` with whole parameters, in the main process."""
        changed = dict(state)
        for name, value in state.items():
            if isinstance(value, DTensor) and (whole := self._whole(value.to_local(), value.shape)) is not None:
                changed[name] = whole
        return changed

    @torch.no_grad()
    def load_shards(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy this process's parts of whole parameters to its shards; return a ``state_dict`` for the model."""
        changed = dict(state)
        for name, param in self._model.state_dict().items():
            if isinstance(param, DTensor) and name in state and param.shape == state[name].shape:
                part = self.local_part(state[name], param.to_local().shape)
                param.to_local().copy_(part)
                changed[name] = param
        return changed

    def whole_optimizer(self, state: State) -> State:
        """Return the optimizer's ``state_dict`` with whole tensors, in the main process."""
        return self._change(state, 0, self._whole)

    def part_optimizer(self, state: State) -> State:
        """Return the optimizer's ``state_dict`` with this process's parts of whole tensors."""
        return self._change(state, 1, self.local_part)

    def _change(self, state: State, kind: int, change: Callable[[Tensor, torch.Size], Any]) -> State:
        """Convert tensors with the shape of a shard (``kind`` 0) or a parameter (1) to the other shape, in order."""
        by_index = {index: dict(values) for index, values in sorted(state["state"].items())}
        for index, values in by_index.items():
            shapes = self._shapes.get(index)
            for key, value in sorted(values.items()):
                if shapes is not None and isinstance(value, Tensor) and value.shape == shapes[kind]:
                    values[key] = change(value, shapes[1 - kind])
        return state | {"state": by_index}

    def _whole(self, part: Tensor, shape: torch.Size) -> Tensor | None:
        """Return the whole tensor from all processes' parts, in the main process; None elsewhere."""
        longest = -(-shape[0] // self.peers.size)
        padded = part.new_zeros(longest, *shape[1:])
        padded[: len(part)] = part
        parts = self.peers.gather_to_main(padded)
        return None if parts is None else torch.cat([shard.cpu() for shard in parts])[: shape[0]].clone()

    def local_part(self, whole: Tensor, shape: torch.Size) -> Tensor:
        """Return a copy of this process's part, of the given shape, of a whole tensor."""
        longest = -(-len(whole) // self.peers.size)
        start = min(self.peers.rank * longest, len(whole))
        return whole[start : start + shape[0]].clone()
