"""What the autograd graph of some tensors tells: its leaves, and whether its operators can be batched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fastmtl.errors import UsageError

__all__ = ["Node", "batches_well", "graph_nodes", "inner_nodes", "leaf_tensors", "number_now", "reached_leaves"]

# A node of an autograd graph.
Node: TypeAlias = Any


def graph_nodes(roots: Iterable[Node], excluded: Iterable[Node] = ()) -> Iterator[Node]:
    """Yield the nodes reachable from ``roots``, breadth first, without ``excluded`` and what lies behind them only."""
    seen = set(excluded)
    level = [node for node in dict.fromkeys(roots) if node not in seen]
    while level:
        seen.update(level)
        yield from level
        reached = (child for node in level for child, _ in node.next_functions)
        level = [child for child in dict.fromkeys(reached) if child is not None and child not in seen]


def _edges(tensors: Sequence[Tensor], name: str) -> list[Node]:
    for index, tensor in enumerate(tensors):
        if tensor.grad_fn is None:
            raise UsageError(f"{name}[{index}] must depend on tensors that require grad, got one without a graph.")
    return [tensor.grad_fn for tensor in tensors]


def leaf_tensors(
    tensors: Sequence[Tensor], name: str, excluded: Sequence[Tensor] = (), excluded_name: str = ""
) -> list[Tensor]:
    """Return the leaves that ``tensors`` were computed from, without those reached through ``excluded`` only.

    Raises:
        UsageError: One of the tensors has no graph.
    """
    nodes = graph_nodes(_edges(tensors, name), _edges(excluded, excluded_name))
    # Only the node that accumulates into a leaf knows a variable.
    return list(dict.fromkeys(node.variable for node in nodes if hasattr(node, "variable")))


def batches_well(tensors: Sequence[Tensor]) -> bool:
    """Return whether several VJPs through the tensors' graph are one batched one with gain.

    Compiled functions and functions written in Python have no batching rules, nor has a recurrent network's; a
    convolution's makes a grouped one of it, which is slower than one after the other.
    """
    for node in graph_nodes(tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None):
        if isinstance(node, BackwardCFunction) or any(word in type(node).__name__ for word in ("Conv", "Rnn", "RNN")):
            return False
    return True


def reached_leaves(outputs: Sequence[Tensor]) -> set[Tensor]:
    """Return the leaves of the graphs of those outputs that have one."""
    return {node.variable for node in graph_nodes(_roots(outputs)) if hasattr(node, "variable")}


def inner_nodes(outputs: Sequence[Tensor]) -> list[Node]:
    """Return the nodes of the graphs of outputs that are no leaves."""
    return [node for node in graph_nodes(_roots(outputs)) if not hasattr(node, "variable")]


def number_now() -> int:
    """Return the number of an autograd node made now; those made earlier, in this thread, have lower ones."""
    node: Node = torch.zeros((), requires_grad=True).clone().grad_fn
    number: int = node._sequence_nr()
    return number


def _roots(outputs: Sequence[Tensor]) -> list[Node]:
    return [output.grad_fn for output in outputs if output.grad_fn is not None]
