"""mtl_backward and jac_to_grad: a network with a shared part and heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.aggregation import (
    CAGrad,
    ConFIG,
    ExcessMTL,
    GradDrop,
    GramianWeightedAggregator,
    Mean,
    MeanWeighting,
    NashMTL,
    Sum,
    TrimmedMean,
    UPGrad,
    WeightedAggregator,
    Weighting,
)
from fastmtl.autojac import backward, jac_to_grad, mtl_backward
from fastmtl.errors import UsageError


class Net(nn.Module):
    """One shared layer, T heads."""

    def __init__(self, tasks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.shared = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(tasks))

    def losses(self) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(2)
        inputs, labels = torch.randn(8, 6, generator=generator), torch.randn(8, 1, generator=generator)
        features = self.shared(inputs)
        return [(head(features) - labels).square().mean() for head in self.heads], features


def expected(net: Net) -> tuple[list[Tensor], list[Tensor]]:
    losses, _ = net.losses()
    shared, own = list(net.shared.parameters()), list(net.heads.parameters())
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    return [torch.stack(column) for column in zip(*rows, strict=True)], list(torch.autograd.grad(sum(losses), own))


@pytest.mark.parametrize("chunk", [None, 1, 2, 9])
@pytest.mark.parametrize("tasks", [1, 3, 9])
def test_heads_get_gradients_and_the_shared_part_a_jacobian(tasks: int, chunk: int | None) -> None:
    net = Net(tasks)
    jacobians, grads = expected(net)
    losses, features = net.losses()
    mtl_backward(losses, features=features, parallel_chunk_size=chunk)
    for param, jacobian in zip(net.shared.parameters(), jacobians, strict=True):
        torch.testing.assert_close(param.jac, jacobian)
        assert param.grad is None
    for param, grad in zip(net.heads.parameters(), grads, strict=True):
        torch.testing.assert_close(param.grad, grad)


def test_older_forms_name_the_losses_and_take_an_aggregator() -> None:
    nets = [Net() for _ in range(3)]
    losses, features = nets[0].losses()
    mtl_backward(losses, features=features)
    jac_to_grad(nets[0].shared.parameters(), UPGrad())
    losses, features = nets[1].losses()
    mtl_backward(losses=losses, features=features, aggregator=UPGrad())
    losses, features = nets[2].losses()
    mtl_backward(losses, features, UPGrad(), [head.parameters() for head in nets[2].heads], nets[2].shared.parameters())
    for params in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(params[0].grad, params[1].grad)
        torch.testing.assert_close(params[0].grad, params[2].grad)


def test_compiled_networks_give_the_same() -> None:
    net = Net(9)
    jacobians, grads = expected(net)
    net.shared.compile(backend="aot_eager")
    losses, features = net.losses()
    mtl_backward(losses, features=features)
    for param, jacobian in zip(net.shared.parameters(), jacobians, strict=True):
        torch.testing.assert_close(param.jac, jacobian)
    for param, grad in zip(net.heads.parameters(), grads, strict=True):
        torch.testing.assert_close(param.grad, grad)


def test_several_features_of_which_a_task_uses_some() -> None:
    shared = torch.tensor([1.0, 2.0], requires_grad=True)
    heads = [torch.tensor(3.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)]
    total, square = shared.sum(), shared**2
    mtl_backward([heads[0] * total, (heads[1] * square).sum()], features=[total, square])
    torch.testing.assert_close(shared.jac, torch.tensor([[3.0, 3.0], [-2.0, -4.0]]))
    assert [head.grad.item() for head in heads] == [3.0, 5.0]


def test_tensors_that_are_no_losses_need_their_cotangents() -> None:
    shared, head = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([2.0, 5.0], requires_grad=True)
    features = shared * 3
    cotangent = torch.tensor([1.0, -1.0])
    with pytest.raises(UsageError, match="grad_tensors"):
        mtl_backward([head * features], features=features)
    mtl_backward([head * features], features=features, grad_tensors=[cotangent])
    torch.testing.assert_close(shared.jac, torch.tensor([[6.0, -15.0]]))
    torch.testing.assert_close(head.grad, torch.tensor([3.0, -6.0]))


def test_parameters_of_several_heads_add_up_and_keep_memory_of_their_own() -> None:
    shared = torch.ones(2, requires_grad=True)
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    features = 2 * shared
    # Autograd hands the same expanded tensor to both summands.
    losses = [((a + b) + features).sum(), (features * a).sum()]
    mtl_backward(losses, features=features)
    assert torch.equal(a.grad, torch.tensor([3.0, 3.0]))
    a.grad.add_(1)
    b.grad.add_(1)
    assert torch.equal(b.grad, torch.tensor([2.0, 2.0]))


def test_errors_name_the_argument() -> None:
    net = Net()
    losses, features = net.losses()
    shared = list(net.shared.parameters())
    own = [list(head.parameters()) for head in net.heads]
    calls: list[tuple[Any, str]] = [
        (lambda: mtl_backward(features=features), "losses"),
        (lambda: mtl_backward(losses, losses=losses, features=features), "losses"),
        (lambda: mtl_backward(losses), "features"),
        (lambda: mtl_backward([], features=features), "tensors"),
        (lambda: mtl_backward(losses, features=[]), "features"),
        (lambda: mtl_backward(losses, features=[features, features]), "features"),
        (lambda: mtl_backward(losses, features=features, tasks_params=own[:2]), "tasks_params"),
        (lambda: mtl_backward(losses, features=features, tasks_params=own, shared_params=own[0]), "shared_params"),
        (lambda: mtl_backward(losses, features=features, grad_tensors=[torch.ones(())]), "grad_tensors"),
        (lambda: mtl_backward(losses, features=features, parallel_chunk_size=0), "parallel_chunk_size"),
        (lambda: mtl_backward(losses, features=shared[0]), r"features\[0\]"),
        (lambda: jac_to_grad([], UPGrad()), "tensors"),
        (lambda: jac_to_grad(shared, UPGrad()), ".jac"),
        (lambda: jac_to_grad([shared[0], shared[0]], UPGrad()), "once"),
    ]
    for call, words in calls:
        with pytest.raises(UsageError, match=words):
            call()
    assert all(param.grad is None and not hasattr(param, "jac") for param in net.parameters())


def test_a_loss_that_passes_by_the_features_is_found_out() -> None:
    net = Net()
    losses, features = net.losses()
    losses[0] = losses[0] + net.shared[0].weight.sum()
    with pytest.raises(UsageError, match="shared_params"):
        mtl_backward(losses, features=features)


@pytest.mark.parametrize(
    "aggregator",
    [
        UPGrad(),
        CAGrad(0.5),
        Mean(),
        Sum(),
        ConFIG(),
        TrimmedMean(1),
        NashMTL(3),
        ExcessMTL(),
        GradDrop(lambda p: p > 2),
    ],
    ids=str,
)
def test_jac_to_grad_is_the_aggregation_of_the_whole_jacobian(aggregator: Any) -> None:
    net = Net()
    losses, features = net.losses()
    mtl_backward(losses, features=features)
    shared = list(net.shared.parameters())
    whole = torch.cat([param.jac.flatten(1) for param in shared], dim=1)
    expected = aggregator(whole)
    if hasattr(aggregator, "reset"):
        aggregator.reset()
    shared[0].grad = torch.ones_like(shared[0])
    weights = jac_to_grad(shared, aggregator, retain_jac=True)
    shared[0].grad -= 1
    torch.testing.assert_close(torch.cat([param.grad.flatten() for param in shared]), expected)
    if weights is not None:
        torch.testing.assert_close(weights @ whole, expected)
    assert all(hasattr(param, "jac") for param in shared)


def test_hooks_watch_and_change_the_weights() -> None:
    def filled() -> list[Tensor]:
        net = Net()
        losses, features = net.losses()
        mtl_backward(losses, features=features)
        return list(net.shared.parameters())

    plain = filled()
    weights = jac_to_grad(plain, UPGrad())
    aggregator = UPGrad()
    seen = []
    aggregator.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    aggregator.weighting.register_forward_hook(lambda module, args, out: 2 * out)
    aggregator.gramian_weighting.register_forward_hook(lambda module, args, out: 5 * out)
    hooked = filled()
    torch.testing.assert_close(jac_to_grad(hooked, aggregator), 10 * weights)
    torch.testing.assert_close(hooked[0].grad, 10 * plain[0].grad)
    assert seen == [(3, 35)]
    with pytest.raises(UsageError, match="optimize_gramian_computation"):
        jac_to_grad(filled(), aggregator, optimize_gramian_computation=True)


@pytest.mark.parametrize(
    ("base", "args"), [(UPGrad, ()), (Mean, ()), (ConFIG, ()), (TrimmedMean, (1,))], ids=lambda value: str(value)
)
def test_a_derived_aggregator_is_called(base: Any, args: tuple[Any, ...]) -> None:
    class Normalised(base):
        def forward(self, matrix: Tensor, /) -> Tensor:
            found = super().forward(matrix)
            return found / found.norm()

    net = Net()
    losses, features = net.losses()
    mtl_backward(losses, features=features)
    shared = list(net.shared.parameters())
    whole = torch.cat([param.jac.flatten(1) for param in shared], dim=1)
    jac_to_grad(shared, Normalised(*args))
    torch.testing.assert_close(torch.cat([param.grad.flatten() for param in shared]), Normalised(*args)(whole))


def test_a_derived_weighting_sees_the_jacobian() -> None:
    class Longest(MeanWeighting):
        def forward(self, matrix: Tensor, /) -> Tensor:
            return (matrix.norm(dim=1) == matrix.norm(dim=1).max()).to(matrix.dtype)

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    backward([x.sum(), (x**2).sum()])
    weights = jac_to_grad([x], WeightedAggregator(Longest()))
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0]))


def test_a_weighting_of_ones_own_sees_the_gram_matrix_in_the_dtype_of_the_gradients() -> None:
    class Longest(Weighting[Any]):
        def forward(self, gramian: Tensor, /) -> Tensor:
            return torch.nn.functional.one_hot(gramian.diagonal().argmax(), len(gramian)).to(torch.float32)

    rows = torch.tensor([[1.0, 0.0], [0.0, -3.0]])
    aggregator = GramianWeightedAggregator(Longest())
    torch.testing.assert_close(aggregator(rows), rows[1])
    param = torch.zeros(2, requires_grad=True)
    backward([param @ row for row in rows], aggregator)
    torch.testing.assert_close(param.grad, rows[1])


def test_more_rows_than_the_kernels_take() -> None:
    torch.manual_seed(0)
    param = torch.randn(40, requires_grad=True)
    losses = torch.randn(150, 40) @ param
    backward(losses)
    jacobian = param.jac
    jac_to_grad([param], UPGrad())
    torch.testing.assert_close(param.grad, UPGrad()(jacobian))
