"""The engine against the Gram matrix of the whole Jacobian."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.aggregation import UPGrad, UPGradWeighting
from fastmtl.autogram import Engine, engine
from fastmtl.autojac import backward, jac, jac_to_grad
from fastmtl.errors import UsageError


class Tied(nn.Module):
    """A layer called twice, and one whose weight is also used without it."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(self.twice(x).tanh())
        return self.tied(hidden) @ self.tied.weight


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), dilation=(1, 2)),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, groups=2),
        nn.Conv2d(4, 3, 1, bias=False),
        nn.Flatten(),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (5, 4)),
    "conv": (conv, (2, 9, 8)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1, stride=2), nn.Flatten()), (3, 11)),
    "circular": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), nn.Flatten()), (3, 7)),
    "tied": (Tied, (4,)),
    "frozen": (frozen, (4,)),
}


def build(name: str, batch: int = 6) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = NETS[name]
    return make().double(), torch.randn(batch, *shape, dtype=torch.float64)


def expected(net: nn.Module, losses: Tensor) -> Tensor:
    params = [param for param in net.parameters() if param.requires_grad]
    rows = torch.cat([each.flatten(1) for each in jac(losses, params, retain_graph=True)], dim=1)
    return rows @ rows.T


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("name", NETS)
def test_one_loss_per_sample(name: str, batch_dim: int | None) -> None:
    net, inputs = build(name)
    engine = Engine(net, batch_dim=batch_dim)
    losses = net(inputs).flatten(1).square().sum(1)
    torch.testing.assert_close(engine.compute_gramian(losses), expected(net, losses))


@pytest.mark.parametrize("batch_dim", [None, 0, 1, 2, -1])
def test_several_losses_per_sample_in_any_dimension(batch_dim: int | None) -> None:
    net, inputs = build("tokens", batch=4)
    engine = Engine(net, batch_dim=batch_dim)
    losses = net(inputs).square().movedim(0, 0 if batch_dim is None else batch_dim)
    torch.testing.assert_close(engine.compute_gramian(losses), expected(net, losses))


def test_both_ways_to_the_weights_products_agree() -> None:
    from fastmtl.autogram.layers import weight_gram

    generator = torch.Generator().manual_seed(0)
    for places, size in ((1, 30), (40, 2)):
        inputs = torch.randn(5, places, size, generator=generator, dtype=torch.float64)
        slopes = torch.randn(2, 5, places, size, generator=generator, dtype=torch.float64)
        rows = torch.einsum("dbso,bsi->dboi", slopes, inputs).flatten(0, 1).flatten(1)
        torch.testing.assert_close(weight_gram(inputs, slopes), rows @ rows.T)


def test_linear_and_convolutional_layers_need_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("rows of the Jacobian were asked for")

    monkeypatch.setattr(engine, "jac", refuse)
    for name in ("linear", "conv1d", "frozen"):
        net, inputs = build(name)
        hooked = Engine(net, batch_dim=0)
        hooked.compute_gramian(net(inputs).square().sum(1))
    net, inputs = build("tied")
    hooked = Engine(net, batch_dim=0)
    with pytest.raises(AssertionError):
        hooked.compute_gramian(net(inputs).square().sum(1))


def test_a_step_is_that_of_the_jacobian() -> None:
    net, inputs = build("linear")
    engine = Engine(net, batch_dim=0)
    losses = net(inputs).square().sum(1)
    losses.backward(UPGradWeighting()(engine.compute_gramian(losses)))
    other, _ = build("linear")
    backward(other(inputs).square().sum(1))
    jac_to_grad(other.parameters(), UPGrad())
    for param, same in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param.grad, same.grad)


def test_parts_of_a_network() -> None:
    net, inputs = build("linear")
    engine = Engine(net[2], batch_dim=0)
    losses = net(inputs).square().sum(1)
    torch.testing.assert_close(engine.compute_gramian(losses), expected(net[2], losses))


@pytest.mark.slow
def test_nothing_is_kept_of_graphs_or_engines() -> None:
    net, inputs = build("linear")
    engine = Engine(net, batch_dim=0)
    out = net(inputs)
    kept = weakref.ref(out.grad_fn.metadata["fastmtl.autogram"][1])
    assert kept() is not None
    del out
    gc.collect()
    assert kept() is None
    del engine
    gc.collect()
    assert not net[0]._forward_hooks


def test_modules_that_mix_samples_are_refused() -> None:
    for module in (nn.BatchNorm1d(3), nn.GRU(3, 3), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)):
        with pytest.raises(UsageError, match="batch_dim"):
            Engine(module, batch_dim=0)
        Engine(module, batch_dim=None)
    with pytest.raises(UsageError, match="output"):
        Engine(nn.Linear(2, 2), batch_dim=0).compute_gramian(torch.ones(3))
