"""Where a trunk's graph can be cut, so that groups of its parameters are differentiated one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from fastmtl.engine.graph import graph_nodes, is_leaf, reached_leaves, root_nodes
from fastmtl.engine.trees import tensors_of

__all__ = ["Blocks", "Place", "Segment", "find_blocks"]

# A module, by its number, and the number of its call.
Place = tuple[int, int]


class Segment(NamedTuple):
    """A part of a graph between two cuts.

    Attributes:
        outputs: Where it begins, as a backward pass goes.
        end: The output of an earlier module, where it ends; None where the graph does.
        block: The indices of the parameters in it.
    """

    outputs: Sequence[Tensor]
    end: Tensor | None
    block: Sequence[int]


@dataclass(frozen=True)
class Blocks:
    """A chain of blocks of parameters, each with whole groups, from the last one to the first.

    Attributes:
        modules: The modules of the network.
        cuts: Those between whose outputs the blocks lie.
        blocks: The indices of each block's parameters.
    """

    modules: Sequence[nn.Module]
    cuts: Sequence[Place]
    blocks: Sequence[Sequence[int]]

    @contextmanager
    def watching(self) -> Iterator[dict[Place, Tensor]]:
        """Collect the outputs of the modules at the cuts in the block."""
        with _outputs_of({place: self.modules[place] for place, _ in self.cuts}) as outputs:
            yield outputs

    def segments(
        self, features: Sequence[Tensor], outputs: Mapping[Place, Tensor], params: Sequence[Tensor]
    ) -> list[Segment] | None:
        """Return the segments of this graph, None if it is not a chain of the blocks."""
        places = {param: place for place, param in enumerate(params)}
        segments, begin = [], features
        if not _shows_all(features):
            return None
        for cut, block in zip([*self.cuts, None], self.blocks, strict=True):
            end = None if cut is None else outputs.get(cut)
            is_cut = end is not None and not end._backward_hooks
            leaves = None if cut is not None and not is_cut else _leaves_down_to(begin, end)
            if leaves is None or not {places[leaf] for leaf in leaves if leaf in places}.issubset(block):
                return None
            segments.append(Segment(begin, end, block))
            begin = [] if end is None else [end]
        return segments


def find_blocks(
    run: Callable[[], Sequence[Tensor]], modules: Sequence[nn.Module], params: Sequence[Tensor], groups: Sequence[int]
) -> Blocks | None:
    """Return the smallest blocks that a network can be cut into, None if it cannot.

    Args:
        run: Runs the trunk, and returns its features.
        modules: The modules of the network.
        params: Its shared parameters.
        groups: The group of each.
    """
    group_of = dict(zip(params, groups, strict=True))
    with _outputs_of(dict(enumerate(modules))) as outputs:
        features = run()
    if not _shows_all(features):
        return None
    shared = reached_leaves(features) & set(params)
    # For each set of parameters below a cut the smallest tensor, of which there will be one gradient per task.
    cuts: dict[frozenset[Tensor], tuple[Place, Tensor]] = {}
    for place, output in outputs.items():
        above = _leaves_down_to(features, output)
        below = frozenset(reached_leaves([output]) & shared)
        # Hooks of a tensor would run where a segment ends, and where the next one begins.
        if above is None or output._backward_hooks or not below or below == shared or not below.isdisjoint(above):
            continue
        apart = {group_of[param] for param in below}.isdisjoint(group_of[param] for param in shared - below)
        if apart and (below not in cuts or output.numel() < cuts[below][1].numel()):
            cuts[below] = place, output
    if not cuts:
        return None
    chain: list[frozenset[Tensor]] = []
    for below in sorted(cuts, key=len, reverse=True):
        # Of branches side by side one is cut off.
        if not chain or below < chain[-1]:
            chain.append(below)
    groups_of_blocks = [
        {group_of[param] for param in larger - smaller}
        for larger, smaller in zip([frozenset(shared), *chain], [*chain, frozenset[Tensor]()], strict=True)
    ]
    # What this batch does not reach is in no graph.
    groups_of_blocks[-1] |= set(groups) - set().union(*groups_of_blocks)
    blocks = [[k for k, group in enumerate(groups) if group in of_block] for of_block in groups_of_blocks]
    return Blocks(modules, [cuts[key][0] for key in chain], blocks)


def _shows_all(features: Sequence[Tensor]) -> bool:
    """Return whether no feature is a parameter itself, which no graph shows."""
    return not any(feature.requires_grad and feature.grad_fn is None for feature in features)


def _leaves_down_to(outputs: Sequence[Tensor], end: Tensor | None) -> set[Tensor] | None:
    """Return the leaves of outputs that are reached otherwise than through ``end``.

    None if they are not only reached through it but also through another output of the same function.
    """
    stop = None if end is None else end.grad_fn
    number = None if end is None else end.output_nr
    if any(output.grad_fn is stop and output.output_nr != number for output in outputs if stop is not None):
        return None
    leaves = set()
    for node in graph_nodes(root_nodes(outputs), () if stop is None else (stop,)):
        if stop is not None and any(child is stop and place != number for child, place in node.next_functions):
            return None
        if is_leaf(node):
            leaves.add(node.variable)
    return leaves


@contextmanager
def _outputs_of(modules: Mapping[int, nn.Module]) -> Iterator[dict[Place, Tensor]]:
    """Collect the output of each call of some modules in the block, where one tensor of it has a graph."""
    outputs: dict[Place, Tensor] = {}
    calls: dict[int, int] = {}

    def keep(place: int, module: nn.Module, args: object, output: object) -> None:
        calls[place] = calls.get(place, -1) + 1
        attached = [tensor for tensor in tensors_of(output) if tensor.grad_fn is not None]
        if len(attached) == 1:
            outputs[place, calls[place]] = attached[0]

    hooks = [module.register_forward_hook(partial(keep, place)) for place, module in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
