"""balance and balanced: one call in place of the sum's backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl.aggregation import MGDA, PCD, CAGrad, ExcessMTL, FairGrad, GradDrop, GradVac, NashMTL, Sum, UPGrad
from fastmtl.errors import UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 1), "b": nn.Linear(5, 1)})

    def losses(self, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        features = self.shared(torch.randn(8, 4, generator=generator))
        labels = torch.randn(8, 1, generator=generator)
        return {task: (head(features) - labels).square().mean() for task, head in self.heads.items()}


def grads(net: nn.Module) -> list[Tensor]:
    return [param.grad for param in net.parameters()]


def reference(aggregator: Any, seed: int = 1) -> list[Tensor]:
    from fastmtl.autojac import backward

    net = Net()
    losses = list(net.losses(seed).values())
    own = torch.autograd.grad(sum(losses), list(net.heads.parameters()), retain_graph=True)
    backward(losses, aggregator, net.shared.parameters())
    return [*grads(net.shared), *own]


@pytest.mark.parametrize("shared", ["module", "parameters", "found"])
def test_shared_gradients_are_balanced_and_the_others_summed(shared: str) -> None:
    net = Net()
    given = {"module": net.shared, "parameters": net.shared.parameters(), "found": None}[shared]
    weights = fastmtl.balance(net.losses(), shared=given, weighting="UPGrad")
    torch.testing.assert_close(grads(net), reference(UPGrad()))
    assert weights is not None
    assert weights.shape == (2,)


def test_the_sum_is_the_sums_backward_pass() -> None:
    net, plain = Net(), Net()
    fastmtl.balance(list(net.losses().values()), weighting=Sum())
    sum(plain.losses().values()).backward()
    torch.testing.assert_close(grads(net), grads(plain))


def test_a_balanced_loss_scales_and_accumulates() -> None:
    net = Net()
    for seed in (1, 2):
        losses = net.losses(seed)
        loss = fastmtl.balanced(losses, weighting="upgrad")
        torch.testing.assert_close(loss.detach(), sum(losses.values()).detach())
        (64 * loss / 2).backward()
    expected = [32 * (one + two) for one, two in zip(reference(UPGrad(), 1), reference(UPGrad(), 2), strict=True)]
    torch.testing.assert_close(grads(net), expected)


SCALED: dict[str, Any] = {
    "UPGrad": UPGrad,
    "MGDA": MGDA,
    "CAGrad": lambda: CAGrad(0.4),
    "FairGrad": lambda: FairGrad(2.0),
    "NashMTL": lambda: NashMTL(2),
    "PCD": PCD,
    "ExcessMTL": ExcessMTL,
    "GradDrop": GradDrop,
}
# The last three need rows.
IN_LAYERS = list(SCALED)[:-3]


@pytest.mark.parametrize(
    ("name", "layerwise"), [*((name, False) for name in SCALED), *((name, True) for name in IN_LAYERS)]
)
def test_a_loss_scale_changes_no_weights(name: str, layerwise: bool) -> None:
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        net, aggregator = Net(), SCALED[name]()
        options = {"vjps": fastmtl.Layerwise()} if layerwise else {}
        for seed in (1, 2):
            (scale * fastmtl.balanced(net.losses(seed), weighting=aggregator, **options)).backward()
        found.append([grad / scale for grad in grads(net)])
    torch.testing.assert_close(*found)


def test_a_loss_times_zero_has_no_gradient() -> None:
    net = Net()
    (0 * fastmtl.balanced(net.losses(), weighting=NashMTL(2))).backward()
    assert not any(grad.any() for grad in grads(net))


def test_without_gradients_it_is_the_sum() -> None:
    net = Net()
    with torch.no_grad():
        loss = fastmtl.balanced(net.losses())
    assert not loss.requires_grad


def test_names_in_any_case_with_their_arguments() -> None:
    for name, hyper in (("pcgrad", {}), ("CAGRAD", {"c": 0.4}), ("aligned-mtl", {}), ("imtlg", {})):
        fastmtl.balance(Net().losses(), weighting=name, **hyper)


def test_errors_name_the_argument() -> None:
    net = Net()
    losses = net.losses()
    calls: list[tuple[Any, str]] = [
        (lambda: fastmtl.balance([]), "losses"),
        (lambda: fastmtl.balance([torch.ones(2, requires_grad=True)]), r"losses\[0\] must be a scalar"),
        (lambda: fastmtl.balance(losses, weighting="mgdaa"), "Did you mean 'MGDA'"),
        (lambda: fastmtl.balance(losses, weighting="gradvac"), "Unknown weighting"),
        (lambda: fastmtl.balance(losses, weighting="cagrad"), "cagrad"),
        (lambda: fastmtl.balance(losses, weighting=GradVac(), beta=0.1), "beta"),
        (lambda: fastmtl.balance(losses, shared=[torch.ones(2, requires_grad=True)]), "shared"),
    ]
    for call, words in calls:
        with pytest.raises(UsageError, match=words):
            call()


@pytest.mark.parametrize("aggregator", [GradVac()])
def test_an_aggregator_that_remembers_is_given_as_an_object(aggregator: GradVac) -> None:
    for seed in (1, 2):
        fastmtl.balance(Net().losses(seed), weighting=aggregator)
    assert aggregator.gramian_weighting._phi_t is not None
