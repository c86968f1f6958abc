"""Embedding tables: gradients of the rows that a batch has touched, from the gradients of what was looked up.

Of a table of N rows a batch looks up n, often the same one several times. Its gradient is zero elsewhere: T gradients
of U <= n rows take the place of T gradients of N. They come from the cotangents of the looked-up vectors or bags, so
that autograd makes no gradient of the table at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fastmtl import ops
from fastmtl.engine.graph import Node, graph_nodes, is_leaf, root_nodes
from fastmtl.engine.vjp import Cotangents, vjp
from fastmtl.ops._touched import Touched

__all__ = ["TableVJP", "sparse_leaves", "sparse_tables", "table_uses"]

_LOOKUPS = ("EmbeddingBackward0", "EmbeddingBagBackward0")
# Of the modes of a bag.
_SUM, _MEAN = 0, 1


@dataclass(frozen=True, slots=True, eq=False)
class _Use:
    """One look-up in a table.

    Attributes:
        edge: The graph's edge of the vectors (..., d), or bags (B, d).
        ids: (n,) rows of the table.
        source: (n,) the vector or bag of each; None where each has its own.
        scale: (n,) its factor in the bag; None for 1.
        gain: (B,) the factor of each bag; None for 1.
        sparse: Whether autograd makes a sparse gradient of it.
    """

    edge: GradientEdge
    ids: Tensor
    source: Tensor | None
    scale: Tensor | None
    gain: Tensor | None
    sparse: bool


class _Table:
    """The uses of a table in one graph, and the rows that they touch."""

    def __init__(self, weight: Tensor, uses: Sequence[_Use]) -> None:
        self.weight = weight
        self.uses = uses

    @cached_property
    def groups(self) -> tuple[Touched, Tensor, Tensor]:
        """Return the rows, and the positions of the ids of all uses, one behind the other, by row."""
        ids = [use.ids for use in self.uses]
        rows, order, starts = ops.group_rows(ids[0] if len(ids) == 1 else torch.cat(ids))
        return Touched(rows[None], self.weight.shape), order, starts

    @cached_property
    def places(self) -> tuple[Tensor | None, Tensor | None]:
        """Return of the ids of all uses the vectors or bags, one behind the other as the uses are, and the factors."""
        if len(self.uses) == 1:
            return self.uses[0].source, self.uses[0].scale
        sources, begin = [], 0
        for use in self.uses:
            source = torch.arange(len(use.ids), device=use.ids.device) if use.source is None else use.source
            sources.append(source + begin)
            begin += self._length(use)
        scales = None
        if any(use.scale is not None for use in self.uses):
            ones = (self.weight.new_ones(len(use.ids)) if use.scale is None else use.scale for use in self.uses)
            scales = torch.cat(list(ones))
        return torch.cat(sources), scales

    def gradient(self, cotangents: Cotangents) -> Tensor | None:
        """Return the gradient for the cotangents of the uses, sparse and coalesced; None without any."""
        width = self.weight.shape[1]
        if all(cotangent is None for cotangent in cotangents):
            return None
        parts = [
            self.weight.new_zeros(self._length(use), width) if one is None else self._looked_up(use, one)
            for use, one in zip(self.uses, cotangents, strict=True)
        ]
        touched, order, starts = self.groups
        source, scale = self.places
        (values,) = ops.sum_rows([parts[0] if len(parts) == 1 else torch.cat(parts)], order, starts, source, scale)
        return touched.sparse(values)

    def _looked_up(self, use: _Use, cotangent: Tensor) -> Tensor:
        """Return the cotangents (vectors or bags, d) of what is looked up, before a bag's mean is taken."""
        rows = cotangent.reshape(-1, self.weight.shape[1])
        return rows if use.gain is None else rows * use.gain[:, None]

    def _length(self, use: _Use) -> int:
        """Return how many vectors or bags a use looks up."""
        metadata = use.edge.node._input_metadata[0]
        length = 1
        for size in metadata.shape[:-1]:
            length *= int(size)
        return length


class TableVJP:
    """Computes VJPs as `fastmtl.engine.vjp.vjp` does, with sparse gradients of tables.

    Args:
        outputs: What will be differentiated, all of it.
        tables: The parameters that may be tables.

    Attributes:
        tables: Those whose uses are known, and save something: more rows than are looked up.
        dense: Those of them of which autograd makes dense gradients.
    """

    def __init__(self, outputs: Sequence[Tensor], tables: Collection[Tensor]) -> None:
        self.tables = {weight: _Table(weight, uses) for weight, uses in table_uses(outputs, tables).items()}
        self.dense = {weight for weight, table in self.tables.items() if not table.uses[0].sparse}

    def __call__(
        self, outputs: Sequence[Tensor], cotangents: Cotangents, inputs: Sequence[Tensor | GradientEdge], retain: bool
    ) -> list[Tensor | None]:
        """Return the gradients of ``sum <output, cotangent>``; see `fastmtl.engine.vjp.vjp`."""
        of_inputs = [self.tables.get(source) if isinstance(source, Tensor) else None for source in inputs]
        wanted: list[Tensor | GradientEdge] = []
        for source, table in zip(inputs, of_inputs, strict=True):
            wanted += [source] if table is None else [use.edge for use in table.uses]
        grads = iter(vjp(outputs, cotangents, wanted, retain))
        return [
            next(grads) if table is None else table.gradient([next(grads) for _ in table.uses]) for table in of_inputs
        ]


def table_uses(outputs: Sequence[Tensor], tables: Collection[Tensor]) -> dict[Tensor, list[_Use]]:
    """Return the uses of those tables that the graph of ``outputs`` looks rows up in, and uses in no other way.

    Left out are tables with no more rows than are looked up, and those whose gradients have hooks or factors by the
    frequency of a row, or come from greatest entries.
    """
    wanted = {table for table in tables if not table._backward_hooks}
    edges: Counter[Tensor] = Counter()
    uses: dict[Tensor, list[_Use]] = {}
    for node in graph_nodes(root_nodes(outputs)):
        kind = type(node).__name__
        for place, (child, _) in enumerate(node.next_functions):
            if child is None or not is_leaf(child) or child.variable not in wanted:
                continue
            edges[child.variable] += 1
            use = _use(node, kind) if kind in _LOOKUPS and place == 0 else None
            if use is not None:
                uses.setdefault(child.variable, []).append(use)
    return {
        table: found
        for table, found in uses.items()
        if len(found) == edges[table]
        and len({use.sparse for use in found}) == 1
        and sum(len(use.ids) for use in found) < len(table)
    }


def sparse_tables(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradients modules let be sparse."""
    found = {
        id(param)
        for module in model.modules()
        if getattr(module, "sparse", False) is True
        for param in module.parameters(recurse=False)
    }
    return [name for name, param in model.named_parameters() if id(param) in found]


def sparse_leaves(nodes: Iterable[Node]) -> set[Tensor]:
    """Return the leaves whose gradients a graph makes sparse: rows are looked up in them, and nothing else is done."""
    sparse: set[Tensor] = set()
    dense: set[Tensor] = set()
    for node in nodes:
        for place, (child, _) in enumerate(node.next_functions):
            if child is not None and is_leaf(child):
                is_sparse = type(node).__name__ in _LOOKUPS and place == 0 and node._saved_sparse
                (sparse if is_sparse else dense).add(child.variable)
    return sparse - dense


def _use(node: Node, kind: str) -> _Use | None:
    """Return the use that a node is, None if its gradient is of another kind."""
    if node._saved_scale_grad_by_freq:
        return None
    edge, sparse = GradientEdge(node, 0), bool(node._saved_sparse)
    ids, padding = node._saved_indices.detach().flatten().long(), _signed(node._saved_padding_idx)
    source = scale = gain = None
    if kind == "EmbeddingBagBackward0":
        if node._saved_mode not in (_SUM, _MEAN):
            return None
        source = _bag_of_each(node, len(ids))
        weights = node._saved_per_sample_weights
        scale = None if weights is None else weights.detach()
        if node._saved_mode == _MEAN:
            gain = node._saved_result2.detach().clamp(min=1).to(_dtype_of(node)).reciprocal()
    if padding >= 0:
        kept = (ids != padding).nonzero().squeeze(1)
        ids, source = ids[kept], kept if source is None else source[kept]
        scale = None if scale is None else scale[kept]
    return _Use(edge, ids, source, scale, gain, sparse)


def _signed(number: int) -> int:
    """Return an index as it was given: the graph shows those below 0 as unsigned."""
    return number - 2**64 if number >= 2**63 else number


def _dtype_of(node: Node) -> torch.dtype:
    dtype: torch.dtype = node._input_metadata[0].dtype
    return dtype


def _bag_of_each(node: Node, count: int) -> Tensor:
    """Return the bag of each id."""
    known: Tensor = node._saved_result1.detach()
    if len(known) == count:
        return known.long()
    # Kernels that need no such list leave it out.
    offsets: Tensor = node._saved_offsets.detach().long()
    begins = torch.zeros(count + 1, dtype=torch.int64, device=offsets.device)
    begins.index_add_(0, offsets, torch.ones_like(offsets))
    return begins[:count].cumsum(0) - 1
