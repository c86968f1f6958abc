"""The autograd graph of some tensors: its nodes and leaves, and whether its operators can be batched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fastmtl.errors import UsageError

__all__ = [
    "Node",
    "batches_well",
    "graph_nodes",
    "inner_nodes",
    "leaf_tensors",
    "number_now",
    "reached_leaves",
    "root_nodes",
]

# A node of an autograd graph.
Node: TypeAlias = Any


def graph_nodes(roots: Iterable[Node], excluded: Iterable[Node] = ()) -> Iterator[Node]:
    """Yield the nodes reachable from ``roots``, breadth first, without ``excluded`` and what only they reach."""
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
    """Return the leaves that ``tensors`` depend on, without those reached only through ``excluded``.

    Raises:
        UsageError: One of the tensors has no graph.
    """
    nodes = graph_nodes(_edges(tensors, name), _edges(excluded, excluded_name))
    # Only the nodes that accumulate into leaves have a variable.
    return list(dict.fromkeys(node.variable for node in nodes if hasattr(node, "variable")))


def batches_well(tensors: Sequence[Tensor], convolutions: bool = False) -> bool:
    """Return whether batching several VJPs through the tensors' graph may save time.

    Compiled functions, functions written in Python and recurrent networks have no batching rules; the rule of
    convolutions makes a grouped convolution, which on the CPU is slower than one VJP after the other.

    Args:
        tensors: The outputs.
        convolutions: Whether those of convolutions may.
    """
    bad = ("Rnn", "RNN") if convolutions else ("Conv", "Rnn", "RNN")
    return not any(
        isinstance(node, BackwardCFunction) or any(word in type(node).__name__ for word in bad)
        for node in graph_nodes(root_nodes(tensors))
    )


def reached_leaves(outputs: Sequence[Tensor]) -> set[Tensor]:
    """Return the leaves of the graphs of those outputs that have one."""
    return {node.variable for node in graph_nodes(root_nodes(outputs)) if hasattr(node, "variable")}


def inner_nodes(outputs: Sequence[Tensor]) -> list[Node]:
    """Return the nodes of the outputs' graphs that are not leaves."""
    return [node for node in graph_nodes(root_nodes(outputs)) if not hasattr(node, "variable")]


def number_now() -> int:
    """Return the sequence number of a new autograd node; earlier ones of this thread are lower."""
    node: Node = torch.zeros((), requires_grad=True).clone().grad_fn
    number: int = node._sequence_nr()
    return number


def root_nodes(outputs: Sequence[Tensor]) -> list[Node]:
    """Return the nodes of those outputs that have a graph."""
    return [output.grad_fn for output in outputs if output.grad_fn is not None]
