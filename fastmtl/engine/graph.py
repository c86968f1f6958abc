"""The autograd graph of some tensors: its nodes and leaves, and whether its operators can be batched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from fastmtl.errors import UsageError

__all__ = [
    "Node",
    "Reached",
    "batches_well",
    "check_graphs",
    "graph_nodes",
    "inner_nodes",
    "is_leaf",
    "number_now",
    "reach",
    "reached_leaves",
    "root_nodes",
]

# A node of an autograd graph.
Node: TypeAlias = Any
# In the place of an output's number: several depend on a node.
_SEVERAL = -1


def graph_nodes(roots: Iterable[Node], excluded: Iterable[Node] = ()) -> Iterator[Node]:
    """Yield the nodes reachable from ``roots``, breadth first, without ``excluded`` and what only they reach."""
    seen = set(excluded)
    level = [node for node in dict.fromkeys(roots) if node not in seen]
    while level:
        seen.update(level)
        yield from level
        reached = (child for node in level for child, _ in node.next_functions)
        level = [child for child in dict.fromkeys(reached) if child is not None and child not in seen]


def is_leaf(node: Node) -> bool:
    """Return whether a node accumulates into a leaf, its ``variable``; functions may have an attribute of that name."""
    return type(node).__name__ == "AccumulateGrad"


@dataclass(frozen=True, slots=True)
class Reached:
    """What one walk through the graphs of several outputs finds.

    Attributes:
        nodes: All nodes, each once.
        leaves: The leaves, each with the number of the output that depends on it, None if several do.
    """

    nodes: list[Node]
    leaves: dict[Tensor, int | None]

    def leaves_of(self, index: int) -> list[Tensor]:
        """Return the leaves of an output, and those of several outputs, which may be others' alone."""
        return [leaf for leaf, owner in self.leaves.items() if owner is None or owner == index]


def reach(roots: Sequence[Node], excluded: Sequence[Node] = ()) -> Reached:
    """Return what is reachable from ``roots``, one per output, without ``excluded`` and what only they reach.

    Each node is asked for its inputs once and passed through at most twice, however many outputs share it.
    """
    owners: dict[Node, int] = dict.fromkeys(excluded, _SEVERAL)
    inputs: dict[Node, list[Node]] = {}
    for index, root in enumerate(roots):
        pending = [root]
        while pending:
            node = pending.pop()
            owner = owners.get(node)
            if owner is None:
                owners[node] = index
                inputs[node] = [child for child, _ in node.next_functions if child is not None]
            elif owner in (index, _SEVERAL):
                continue
            else:
                owners[node] = _SEVERAL
            pending.extend(inputs[node])
    ends = [node for node in inputs if is_leaf(node)]
    found = [(node.variable, owners[node]) for node in ends]
    return Reached(list(inputs), {leaf: None if owner == _SEVERAL else owner for leaf, owner in found})


def check_graphs(tensors: Sequence[Tensor], name: str) -> None:
    """Raise a UsageError for a tensor without a graph."""
    for index, tensor in enumerate(tensors):
        if tensor.grad_fn is None:
            raise UsageError(f"{name}[{index}] must depend on tensors that require grad, got one without a graph.")


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
    return {node.variable for node in graph_nodes(root_nodes(outputs)) if is_leaf(node)}


def inner_nodes(outputs: Sequence[Tensor]) -> list[Node]:
    """Return the nodes of the outputs' graphs that are not leaves."""
    return [node for node in graph_nodes(root_nodes(outputs)) if not is_leaf(node)]


def number_now() -> int:
    """Return the sequence number of a new autograd node; earlier ones of this thread are lower."""
    node: Node = torch.zeros((), requires_grad=True).clone().grad_fn
    number: int = node._sequence_nr()
    return number


def root_nodes(outputs: Sequence[Tensor]) -> list[Node]:
    """Return the nodes of those outputs that have a graph."""
    return [output.grad_fn for output in outputs if output.grad_fn is not None]
