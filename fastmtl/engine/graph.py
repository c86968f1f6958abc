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
    "bits_of",
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
        leaves: The leaves, each with a number whose bit t is set where output t depends on it.
    """

    nodes: list[Node]
    leaves: dict[Tensor, int]

    @property
    def shared(self) -> list[Tensor]:
        """Return the leaves that several outputs depend on."""
        return [leaf for leaf, outputs in self.leaves.items() if outputs & (outputs - 1)]

    def by_output(self, count: int) -> list[list[Tensor]]:
        """Return the leaves that each of ``count`` outputs depends on."""
        found: list[list[Tensor]] = [[] for _ in range(count)]
        for leaf, outputs in self.leaves.items():
            for index in bits_of(outputs):
                found[index].append(leaf)
        return found

    def places_of(self, leaves: Sequence[Tensor], count: int) -> list[list[int] | None]:
        """Return the places of those of ``leaves`` that each of ``count`` outputs depends on, None for all of them."""
        places: list[list[int]] = [[] for _ in range(count)]
        for place, leaf in enumerate(leaves):
            for index in bits_of(self.leaves.get(leaf, 0)):
                places[index].append(place)
        return [None if len(of_output) == len(leaves) else of_output for of_output in places]


def reach(roots: Sequence[Node], excluded: Sequence[Node] = ()) -> Reached:
    """Return what is reachable from ``roots``, one per output, without ``excluded`` and what only they reach.

    Each node is asked for its inputs and passed through once, however many outputs share it.
    """
    inputs: dict[Node, list[Node]] = {}
    # Each node after all those that it leads to.
    ordered: list[Node] = []
    outputs = dict.fromkeys(excluded, 0)
    for index, root in enumerate(roots):
        if root not in outputs:
            _order(root, inputs, ordered, outputs)
        outputs[root] |= 1 << index
    for node in reversed(ordered):
        of_node = outputs[node]
        for child in inputs[node]:
            outputs[child] |= of_node
    leaves = [node for node in inputs if is_leaf(node)]
    return Reached(list(inputs), {node.variable: outputs[node] for node in leaves})


def bits_of(number: int) -> Iterator[int]:
    """Yield the bits that are set in a number, from the lowest on."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def _order(root: Node, inputs: dict[Node, list[Node]], ordered: list[Node], seen: dict[Node, int]) -> None:
    """Add the nodes that a root leads to, without those that are ``seen``, after their inputs; mark them seen."""
    pending: list[tuple[Node, bool]] = [(root, False)]
    while pending:
        node, is_done = pending.pop()
        if is_done:
            ordered.append(node)
        elif node not in seen:
            seen[node] = 0
            inputs[node] = [child for child, _ in node.next_functions if child is not None]
            pending.append((node, True))
            pending.extend((child, False) for child in inputs[node] if child not in seen)


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
