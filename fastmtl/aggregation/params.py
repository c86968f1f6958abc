"""What losses depend on, in loops of one's own: shared parameters, and those of single losses."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state

from fastmtl.distributed.peers import find_peers
from fastmtl.engine.graph import Node, Reached, check_graphs, reach, root_nodes
from fastmtl.engine.hidden import closed_nodes, refuse_hidden
from fastmtl.engine.tables import sparse_leaves
from fastmtl.errors import UsageError

__all__ = ["Params", "find_params", "is_sharded", "refuse_freed"]

_WHOLE_MODEL = "shared must be the whole model where fully_shard has sharded its parameters, such as shared=model."


@dataclass(frozen=True, slots=True)
class Params:
    """What losses depend on.

    Attributes:
        shared: The shared parameters.
        others: All others.
        by_loss: For each loss the others that it depends on.
        places: For each loss the places of the shared parameters that it depends on; None for all of them.
        closed: The functions of the graph that may use parameters it does not show.
        sparse: Those whose gradients the graph makes sparse.
        dense: The others that it has.
    """

    shared: list[Tensor]
    others: list[Tensor]
    by_loss: list[list[Tensor]]
    places: list[list[int] | None]
    closed: list[Node]
    sparse: Set[Tensor]
    dense: Set[Tensor]


def find_params(losses: Sequence[Tensor], given: nn.Module | Iterable[Tensor] | None) -> Params:
    """Return what losses depend on.

    Args:
        losses: T scalars.
        given: The shared parameters, or their module; those that several losses depend on if None.

    Raises:
        UsageError: A loss without a graph, no shared parameter among the leaves, or a function that hides some.
    """
    check_graphs(losses, "losses")
    reached = reach(root_nodes(losses))
    closed = closed_nodes(reached.nodes)
    refuse_hidden(closed, reached, None, "losses")
    if given is None:
        wanted = list(reached.leaves) if len(losses) == 1 else reached.shared
    elif is_sharded(given):
        # The graph has the gathered parameters, which a sharded model does not name.
        assert isinstance(given, nn.Module)
        wanted = list(reached.leaves)
        if len(wanted) > sum(param.requires_grad for param in given.parameters()):
            raise UsageError(_WHOLE_MODEL)
    else:
        wanted = list(given.parameters() if isinstance(given, nn.Module) else given)
        refuse_hidden(closed, reached, wanted, "shared")
    shared = [leaf for leaf in dict.fromkeys(wanted) if leaf in reached.leaves]
    if not shared:
        raise UsageError("shared must hold parameters that the losses depend on, got none of them.")
    known = set(wanted)
    others = [leaf for leaf in reached.leaves if leaf not in known]
    if not is_sharded(given):
        _refuse_gathered([*shared, *others])
    if find_peers() is not None:
        # Other parameters may be reached, or in another order, in other processes.
        shared = [param for param in dict.fromkeys(wanted) if param.requires_grad]
        others.sort(key=lambda leaf: reached.leaves[leaf] & -reached.leaves[leaf])
    count = len(losses)
    by_loss = Reached([], {leaf: reached.leaves[leaf] for leaf in others}).by_output(count)
    sparse = sparse_leaves(reached.nodes)
    return Params(
        shared, others, by_loss, reached.places_of(shared, count), closed, sparse, reached.leaves.keys() - sparse
    )


def is_sharded(module: object) -> bool:
    """Return whether ``fully_shard`` has wrapped the module or a part of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, nn.Module):
        return False
    return any(isinstance(part, fsdp.FSDPModule) for part in module.modules())


def _refuse_gathered(params: Iterable[Tensor]) -> None:
    """Refuse parameters that FSDP has gathered: their gradients would not be those of the shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    # Which modules have been sharded, torch keeps here alone.
    modules = [module for module in _composable_state._module_state_mapping if isinstance(module, fsdp.FSDPModule)]
    sharded = {param for module in modules for param in module.parameters()}
    if not sharded.isdisjoint(params):
        raise UsageError(_WHOLE_MODEL)


def refuse_freed(params: Iterable[Tensor]) -> None:
    """Refuse parameters without memory: FSDP has gathered and freed them."""
    for param in params:
        is_plain = type(param) in (Tensor, nn.Parameter) and param.layout == torch.strided
        if is_plain and param.numel() and not param.untyped_storage().size():
            raise UsageError(_WHOLE_MODEL)
