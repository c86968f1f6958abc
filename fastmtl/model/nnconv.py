"""Message passing on molecules, as Gilmer et al. (ICML 2017) have it, with fewer multiplications."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.support.extras import need

__all__ = ["EdgeBlock", "EdgeConv", "MoleculeEncoder", "edge_blocks"]


class EdgeConv(nn.Module):
    """A convolution whose weights depend on the edges: torch_geometric's NNConv with means, reassociated.

    An atom's output is ``root(h_i) + bias + mean_j Theta(e_ij)^T h_j`` over the edges to it, where
    ``Theta(e) = B + sum_k a_k(e) W_k`` is a ``channels x channels`` matrix and ``a(e) = relu(linear(e))`` has
    ``hidden`` entries. NNConv makes Theta for every edge. Here the sum over the edges comes first,
    ``mean_j a_k(e_ij) h_j`` for all k, and then one product with all W_k per atom, not per edge: the same numbers up to
    rounding.

    Args:
        channels: Of inputs and outputs.
        edge_width: Numbers known of an edge.
        hidden: Width of the network of the edges.
    """

    def __init__(self, channels: int, edge_width: int, hidden: int = 128) -> None:
        super().__init__()
        self.channels = channels
        self.nn = nn.Sequential(nn.Linear(edge_width, hidden), nn.ReLU(), nn.Linear(hidden, channels * channels))
        self.lin = nn.Linear(channels, channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def edge_weights(self, edge_attr: Tensor) -> Tensor:
        """Return a(e), (edges, hidden), which all rounds of message passing share."""
        weights: Tensor = self.nn[1](self.nn[0](edge_attr))
        return weights

    def forward(self, atoms: Tensor, blocks: Sequence[EdgeBlock]) -> Tensor:
        """Return the outputs (atoms, channels), given the inputs (atoms, channels) and the edges of all graphs."""
        last = self.nn[2]
        assert isinstance(last, nn.Linear)
        weight = (
            last.weight.view(self.channels, self.channels, last.in_features).permute(2, 0, 1).reshape(-1, self.channels)
        )
        bias = last.bias.view(self.channels, self.channels)
        means = torch.cat([block.means(atoms, weight, bias) for block in blocks])
        out: Tensor = self.lin(atoms) + self.bias
        return out.index_add(0, torch.cat([block.atoms for block in blocks]), means)


@dataclass(frozen=True, slots=True)
class EdgeBlock:
    """The edges of graphs of about one size, as dense matrices.

    Attributes:
        atoms: The atoms (n,) of these graphs.
        slots: Where each stands (n,) among graphs * size; None if there are as many.
        edges: ``a(e) / degree`` of each edge (graphs, size * hidden, size): by target and k, by source; 0 without edge.
        adjacency: ``1 / degree`` for each edge (graphs, size, size): by target, by source.
    """

    atoms: Tensor
    slots: Tensor | None
    edges: Tensor
    adjacency: Tensor

    def means(self, atoms: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the mean message (n, channels) to each atom of the block.

        Args:
            atoms: All atoms (atoms, channels).
            weight: W (hidden * channels, channels).
            bias: B (channels, channels).
        """
        graphs, size = self.adjacency.shape[:2]
        inputs = atoms[self.atoms]
        if self.slots is not None:
            inputs = atoms.new_zeros(graphs * size, atoms.shape[1]).index_copy(0, self.slots, inputs)
        inputs = inputs.view(graphs, size, -1)
        sums = torch.bmm(self.edges, inputs).view(graphs * size, -1)
        out = sums @ weight + torch.bmm(self.adjacency, inputs).view(graphs * size, -1) @ bias
        return out if self.slots is None else out[self.slots]


def edge_blocks(
    weights: Tensor, edge_index: Tensor, batch: Tensor, ptr: Tensor, *, one: bool = False
) -> list[EdgeBlock]:
    """Return the edges of graphs as `EdgeConv` takes them, given a(e) (edges, hidden).

    There is a block for each size of a graph, so that no product is with zeros, or one for all.

    Args:
        weights: a(e) of each edge.
        edge_index: Source and target (2, edges) of each edge.
        batch: The graph of each atom (atoms,).
        ptr: The first atom of each graph, and the number of atoms (graphs + 1,).
        one: Make one block, of the size of the largest graph: more multiplications in fewer launches.
    """
    source, target = edge_index
    sizes = ptr[1:] - ptr[:-1]
    place = torch.arange(len(batch), device=batch.device) - ptr[batch]
    limits = sizes.max().unsqueeze(0) if one else sizes.unique()
    # The block of each graph, and its place among the graphs of that.
    block = torch.searchsorted(limits, sizes)
    # Edges by block: parts of one tensor have one gradient.
    order = block[batch[target]].argsort(stable=True)
    source, target = source[order], target[order]
    counts = torch.bincount(block[batch[target]], minlength=len(limits)).tolist()
    degree = torch.bincount(target, minlength=len(batch)).clamp(min=1).to(weights.dtype)[target]
    parts = (weights[order] / degree[:, None]).split(counts)
    inverses, sources, targets = (1 / degree).split(counts), source.split(counts), target.split(counts)
    blocks = []
    for number, size in enumerate(limits.tolist()):
        chosen = block == number
        graphs, among = int(chosen.sum()), chosen.cumsum(0) - 1
        atoms = chosen[batch].nonzero().flatten()
        slots = among[batch] * size + place
        cells = slots[targets[number]] * size + place[sources[number]]
        count, hidden = graphs * size * size, weights.shape[1]
        dense = weights.new_zeros(count, hidden).index_add(0, cells, parts[number])
        adjacency = weights.new_zeros(count).index_add(0, cells, inverses[number])
        blocks.append(
            EdgeBlock(
                atoms,
                None if len(atoms) == graphs * size else slots[atoms],
                dense.view(graphs, size, size, hidden).transpose(2, 3).reshape(graphs, size * hidden, size),
                adjacency.view(graphs, size, size),
            )
        )
    return blocks


class MoleculeEncoder(nn.Module):
    """The network of QM9 in the field's comparisons (Navon et al., ICML 2022): features of a molecule (b, width).

    Three rounds of `EdgeConv` with a gated recurrent unit, then Set2Set (Vinyals et al., ICLR 2016) with three steps
    and a linear layer.

    Args:
        width: Channels of atoms and of the output.
        atom_width: Numbers known of an atom.
        edge_width: Numbers known of an edge.
        rounds: Rounds of message passing.

    Raises:
        UsageError: torch_geometric is not installed.
    """

    def __init__(self, width: int = 64, atom_width: int = 11, edge_width: int = 5, rounds: int = 3) -> None:
        super().__init__()
        aggregations = need("torch_geometric.nn.aggr", "qm9", "The encoder nnconv")
        self.feature_dim = width
        self.rounds = rounds
        self.lin0 = nn.Linear(atom_width, width)
        self.conv = EdgeConv(width, edge_width)
        self.gru = nn.GRUCell(width, width)
        self.set2set = aggregations.Set2Set(width, processing_steps=3)
        self.lin1 = nn.Linear(2 * width, width)

    def forward(self, graphs: Any) -> Tensor:
        """Return the features of each graph of a batch of torch_geometric with ``x`` and ``edge_attr``."""
        weights = self.conv.edge_weights(graphs.edge_attr)
        # Launches cost more than multiplications on a GPU.
        one = graphs.x.device.type != "cpu"
        blocks = edge_blocks(weights, graphs.edge_index, graphs.batch, graphs.ptr, one=one)
        atoms = self.lin0(graphs.x).relu()
        for _ in range(self.rounds):
            messages = self.conv(atoms, blocks).relu()
            atoms = self.gru(messages, atoms)
        pooled = self.set2set(atoms, graphs.batch, dim_size=len(graphs.ptr) - 1)
        features: Tensor = self.lin1(pooled).relu()
        return features
