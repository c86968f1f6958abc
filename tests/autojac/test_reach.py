"""The walk through the autograd graph of several outputs."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn

import fastmtl
from fastmtl.aggregation import Sum, UPGrad
from fastmtl.autojac import jac_to_grad, mtl_backward
from fastmtl.engine.graph import graph_nodes, reach, root_nodes


def leaves(*values: float) -> list[Tensor]:
    return [torch.tensor(value, requires_grad=True) for value in values]


def test_each_leaf_has_the_outputs_that_depend_on_it() -> None:
    shared, below, a, b, both = leaves(1.0, 2.0, 3.0, 4.0, 5.0)
    features = shared * (2 * below)
    first, second, third = a * features, (b + both) * features, both.exp()
    reached = reach(root_nodes([first, second, third]))
    assert reached.leaves == {shared: 0b11, below: 0b11, a: 0b1, b: 0b10, both: 0b110}
    assert set(reached.nodes) == set(graph_nodes(root_nodes([first, second, third])))
    assert reached.by_output(3)[0] == [leaf for leaf in reached.leaves if leaf not in (b, both)]
    assert set(reached.shared) == {shared, below, both}


def test_what_only_the_excluded_reach_is_left_out() -> None:
    shared, a, b = leaves(1.0, 2.0, 3.0)
    features = shared.exp()
    reached = reach(root_nodes([a * features, b * features]), root_nodes([features]))
    assert reached.leaves == {a: 0b1, b: 0b10}
    beside = reach(root_nodes([a * features + shared]), root_nodes([features]))
    assert beside.leaves == {shared: 0b1, a: 0b1}


def test_an_output_within_another_is_shared() -> None:
    a, b = leaves(1.0, 2.0)
    inner = a.exp()
    assert reach(root_nodes([inner, b * inner])).leaves == {a: 0b11, b: 0b10}
    assert reach(root_nodes([b * inner, inner])).leaves == {a: 0b11, b: 0b1}


def test_deep_graphs_do_not_recurse() -> None:
    (leaf,) = leaves(1.0)
    value = leaf
    for _ in range(3000):
        value = value + 1
    assert reach(root_nodes([value, 2 * value])).leaves == {leaf: 0b11}


def test_loops_of_ones_own_walk_through_a_graph_once() -> None:
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 3), nn.ModuleList(nn.Linear(3, 1) for _ in range(3))

    def losses() -> tuple[list[Tensor], Tensor]:
        features = trunk(torch.ones(2, 4)).tanh()
        return [head(features).sum() for head in heads], features

    with mock.patch("fastmtl.aggregation.params.reach", wraps=reach) as walk:
        fastmtl.balance(losses()[0], weighting=UPGrad())
        fastmtl.balanced(losses()[0], shared=trunk, weighting=Sum()).backward()
    assert walk.call_count == 2
    tasks, features = losses()
    with mock.patch("fastmtl.autojac.mtl_backward.reach", wraps=reach) as walk:
        mtl_backward(tasks, features=features)
    jac_to_grad(trunk.parameters(), UPGrad())
    seen = [reach(*call.args).nodes for call in walk.call_args_list]
    assert len(seen) == 2
    assert set(seen[0]).isdisjoint(seen[1])


def test_a_parameter_of_some_heads_gets_the_gradients_of_all() -> None:
    torch.manual_seed(0)
    shared, a, both = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True), torch.randn(3)
    both.requires_grad_()

    def losses() -> list[Tensor]:
        features = shared.tanh()
        return [(a * features).sum(), (both * features).sum(), (both.exp() + features).sum()]

    expected = torch.autograd.grad(sum(losses()), [a, both])
    for aggregator in (UPGrad(), Sum()):
        for param in (a, both):
            param.grad = None
        fastmtl.balance(losses(), shared=[shared], weighting=aggregator)
        torch.testing.assert_close([a.grad, both.grad], list(expected))


def test_the_same_name_is_looked_up_anew_for_other_settings() -> None:
    shared = torch.tensor([1.0, 2.0], requires_grad=True)

    def update(**hyper: object) -> Tensor:
        shared.grad = torch.zeros_like(shared)
        fastmtl.balance([shared.sum(), (shared**2).sum()], weighting="cagrad", **hyper)
        grad: Tensor = shared.grad
        return grad

    first, second = update(c=0.0), update(c=0.9)
    assert not torch.equal(first, second)
    assert torch.equal(update(c=0.0), first)
