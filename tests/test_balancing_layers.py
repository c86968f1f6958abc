"""balance, balanced and autogram's engine layer by layer, against one VJP per loss in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl.aggregation import UPGrad
from fastmtl.autogram import Engine
from fastmtl.distributed.peers import find_peers
from fastmtl.errors import UsageError
from tests.distributed.group import in_processes
from tests.trainer.toy import force_way

EXACT = ["ghost", "compressed"]
# Few inputs and narrow sketches make a large error here.
off = pytest.mark.filterwarnings("ignore:The sketched Gram matrix is off")


class _Net(nn.Module):
    """Convolutions with a norm, heads of one layer each, and a parameter that all losses use."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 5), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 12), nn.Tanh()
        )
        self.heads = nn.ModuleList([nn.Linear(12, 1) for _ in range(3)])
        self.bias = nn.Parameter(torch.zeros(()))
        generator = torch.Generator().manual_seed(0)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator, dtype=torch.float64) / 4

    def losses(self, seed: int = 1, rows: slice = slice(None)) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs, labels = (
            torch.randn(shape, generator=generator, dtype=torch.float64)[rows] for shape in ((4, 3, 6, 6), (4, 3))
        )
        features = self.trunk(inputs)
        return [
            (head(features)[:, 0] + self.bias - column).square().mean()
            for head, column in zip(self.heads, labels.T, strict=True)
        ]


def _grads(net: nn.Module) -> list[Tensor]:
    return [param.grad for param in net.parameters()]


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("shared", ["trunk", None])
def test_exact_ways_give_what_plain_vjps_give(way: str, shared: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, way)
    net, plain = _Net(), _Net()
    vjps = fastmtl.Layerwise()
    for seed in (1, 2):
        weights = [
            fastmtl.balance(
                each.losses(seed), shared=None if shared is None else each.trunk, weighting="upgrad", vjps=way_of
            )
            for each, way_of in ((net, vjps), (plain, None))
        ]
        torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)
    # Added up over the calls.
    torch.testing.assert_close(_grads(net), _grads(plain), rtol=1e-9, atol=1e-12)
    assert vjps.plan is not None
    assert f"2 {way}" in vjps.plan


def test_the_first_call_draws_no_random_numbers_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "ghost")
    net = _Net()
    losses = net.losses()
    state = torch.get_rng_state()
    fastmtl.balance(losses, vjps=fastmtl.Layerwise())
    assert torch.equal(torch.get_rng_state(), state)


@off
@pytest.mark.parametrize("check_every", [1, 100])
def test_a_sketched_update_is_that_of_the_weights(check_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "sketched")
    net = _Net()
    sketch = fastmtl.Sketch(width=16, check_every=check_every, seed=3)
    exact = []
    for seed in (1, 2, 3):
        net.zero_grad()
        weights = fastmtl.balance(net.losses(seed), shared=net.trunk, weighting="upgrad", vjps=sketch)
        assert weights is not None
        losses = net.losses(seed)
        for param in net.trunk.parameters():
            rows = torch.stack([torch.autograd.grad(loss, param, retain_graph=True)[0] for loss in losses])
            torch.testing.assert_close(param.grad, torch.tensordot(weights, rows, 1), rtol=1e-6, atol=1e-9)
        for head, loss in zip(net.heads, losses, strict=True):
            (grad,) = torch.autograd.grad(loss, head.weight, retain_graph=True)
            torch.testing.assert_close(head.weight.grad, grad)
        plain = _Net()
        exact.append(fastmtl.balance(plain.losses(seed), shared=plain.trunk, weighting="upgrad"))
        is_exact = torch.allclose(weights, exact[-1], rtol=1e-9)
        assert is_exact == (seed == 1 or check_every == 1)
        assert (weights - exact[-1]).abs().max() < 0.3
    assert sketch.gram_error is not None
    assert 0 < float(sketch.gram_error) < 0.5


@off
def test_a_sketch_goes_on_where_its_state_was_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    force_way(monkeypatch, "sketched")
    net = _Net()
    sketch = fastmtl.Sketch(width=8, check_every=3, seed=3)

    def call(seed: int, vjps: fastmtl.Sketch) -> Any:
        net.zero_grad()
        return fastmtl.balance(net.losses(seed), shared=net.trunk, weighting="upgrad", vjps=vjps)

    call(1, sketch)
    call(2, sketch)
    torch.save(sketch.state_dict(), tmp_path / "state.pt")
    wanted = [call(seed, sketch) for seed in (3, 4, 5)]
    again = fastmtl.Sketch(width=8, check_every=3)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    for seed, expected in zip((3, 4, 5), wanted, strict=True):
        assert torch.equal(call(seed, again), expected)


def test_a_balanced_loss_goes_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "compressed")
    net, plain = _Net(), _Net()
    (64 * fastmtl.balanced(net.losses(), weighting="upgrad", vjps=fastmtl.Layerwise())).backward()
    (64 * fastmtl.balanced(plain.losses(), weighting="upgrad")).backward()
    torch.testing.assert_close(_grads(net), _grads(plain), rtol=1e-9, atol=1e-12)


def test_without_a_layer_that_gains_it_is_the_plain_way() -> None:
    net, plain, vjps = _Net(), _Net(), fastmtl.Layerwise()
    fastmtl.balance(net.losses(), vjps=vjps)
    fastmtl.balance(plain.losses())
    assert all(torch.equal(one, other) for one, other in zip(_grads(net), _grads(plain), strict=True))
    assert vjps.plan == "vjps: no layer would gain by going another way than the direct one"


def test_other_parameters_are_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "ghost")
    net, plain, vjps = _Net(), _Net(), fastmtl.Layerwise()
    for each, way in ((net, vjps), (plain, None)):
        fastmtl.balance(each.losses(), shared=each.trunk, weighting="upgrad", vjps=way)
        each.trunk[0].requires_grad_(False)
        fastmtl.balance(each.losses(2), shared=each.trunk, weighting="upgrad", vjps=way)
    torch.testing.assert_close(_grads(net), _grads(plain), rtol=1e-9, atol=1e-12)


def test_a_large_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "sketched")
    net = _Net()
    with pytest.warns(UserWarning, match="use a larger width"):
        fastmtl.balance(net.losses(), shared=net.trunk, vjps=fastmtl.Sketch(width=2))


@pytest.mark.parametrize("way", EXACT)
def test_gram_matrices_of_an_engine(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, way)
    net = _Net()
    losses = torch.stack(net.losses())
    engine = Engine(net.trunk, batch_dim=None)
    gram = engine.compute_gramian(losses)
    rows = [torch.autograd.grad(loss, list(net.trunk.parameters()), retain_graph=True) for loss in losses]
    matrix = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    torch.testing.assert_close(gram, matrix @ matrix.T, rtol=1e-9, atol=1e-12)
    losses.backward(UPGrad().weighting(gram))


def test_an_engine_refuses_what_hides_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "ghost")
    net = _Net()
    engine = Engine(net.trunk, net.heads, batch_dim=None)
    inputs = torch.ones(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    features = checkpoint(net.trunk, inputs, use_reentrant=True)
    losses = torch.stack([head(features).mean() for head in net.heads])
    with pytest.raises(UsageError, match="use_reentrant must be False"):
        engine.compute_gramian(losses)


def test_errors_name_the_argument() -> None:
    net = _Net()
    for make, words in (
        (lambda: fastmtl.balance(net.losses(), vjps="sketch"), "vjps must be a fastmtl.Layerwise"),
        (
            lambda: fastmtl.balance(net.losses(), weighting="graddrop", vjps=fastmtl.Layerwise()),
            "vjps must be None for",
        ),
        (lambda: fastmtl.Sketch(width=1), "width must be an integer of at least 2"),
        (lambda: fastmtl.Sketch(check_every=0.5), "check_every must be an integer"),
    ):
        with pytest.raises(UsageError, match=words):
            make()


def _sketched(size: int) -> list[Tensor]:
    """Return gradients and weights after three calls, in one process of ``size``."""
    peers = find_peers()
    rank = 0 if peers is None else peers.rank
    with pytest.MonkeyPatch.context() as patch:
        force_way(patch, "sketched")
        net, sketch, weights = _Net(), fastmtl.Sketch(width=5, check_every=3), []
        for seed in (1, 2, 3):
            losses = net.losses(seed, slice(rank, None, size))
            weights.append(fastmtl.balance(losses, shared=net.trunk, weighting="upgrad", vjps=sketch))
    return [*_grads(net), *(each for each in weights if each is not None)]


def _exact_in_processes(size: int) -> str:
    assert find_peers() is not None
    net = _Net()
    with pytest.raises(UsageError) as caught:
        fastmtl.balance(net.losses(), shared=net.trunk, vjps=fastmtl.Layerwise())
    return f"{size}: {caught.value}"


@off
@pytest.mark.slow
def test_sketches_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    wanted = _sketched(1)
    for found in in_processes(2, tmp_path, _sketched, 2):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    for message in in_processes(2, tmp_path, _exact_in_processes, 2):
        assert "Layerwise would need the inputs of all" in message
