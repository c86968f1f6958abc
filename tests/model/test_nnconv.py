"""The reassociated convolution with edge-dependent weights, against its definition edge by edge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmtl.model import EdgeConv
from fastmtl.model.nnconv import edge_blocks

SIZES = (3, 1, 5, 3)


def _graphs() -> tuple[Tensor, Tensor, Tensor]:
    """Return edges (2, e) of graphs of several sizes, one edge twice and one missing, the graphs of atoms, and ptr."""
    ptr = torch.tensor([0, *torch.tensor(SIZES).cumsum(0)])
    edges = [
        (first + i, first + j)
        for first, size in zip(ptr, SIZES, strict=False)
        for i in range(size)
        for j in range(size)
    ]
    edges = [edge for edge in edges if edge[0] != edge[1]]
    edges = [*edges[1:], edges[-1]]
    return torch.tensor(edges).T, torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES)), ptr


def _by_definition(conv: EdgeConv, atoms: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
    width = conv.channels
    messages: list[list[Tensor]] = [[] for _ in range(len(atoms))]
    for (source, target), attr in zip(edge_index.T.tolist(), edge_attr, strict=True):
        messages[target].append(atoms[source] @ conv.nn(attr).view(width, width))
    means = [torch.stack(of).mean(0) if of else atoms.new_zeros(width) for of in messages]
    return conv.lin(atoms) + conv.bias + torch.stack(means)


@pytest.mark.parametrize("one", [False, True])
def test_outputs_and_gradients_are_those_of_the_definition(one: bool) -> None:
    torch.manual_seed(0)
    edge_index, batch, ptr = _graphs()
    conv = EdgeConv(4, 5, hidden=6).double()
    atoms = torch.randn(len(batch), 4, dtype=torch.float64, requires_grad=True)
    edge_attr = torch.randn(edge_index.shape[1], 5, dtype=torch.float64, requires_grad=True)
    out = conv(atoms, edge_blocks(conv.edge_weights(edge_attr), edge_index, batch, ptr, one=one))
    wanted = _by_definition(conv, atoms, edge_index, edge_attr)
    torch.testing.assert_close(out, wanted)
    pull = torch.randn_like(out)
    inputs = [atoms, edge_attr, *conv.parameters()]
    for found, right in zip(
        torch.autograd.grad(out, inputs, pull), torch.autograd.grad(wanted, inputs, pull), strict=True
    ):
        torch.testing.assert_close(found, right)
