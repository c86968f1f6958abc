"""Parameters whose use the graph does not show are trained as those that it shows, or the network is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl.aggregation import UPGrad
from fastmtl.autogram import Engine
from fastmtl.autojac import backward, jac, mtl_backward
from fastmtl.errors import UsageError
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.toy import Listener, loaders, make_trainer

pytestmark = pytest.mark.usefixtures("in_float64")


class _Inner(torch.autograd.Function):
    """Runs a block's backward pass inside its own, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module, once: bool) -> Tensor:
        ctx.block, ctx.once = block, once
        ctx.kept = [x.detach()]
        with torch.no_grad():
            result: Tensor = block(x)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.kept
        if ctx.once:
            ctx.kept.clear()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.block(x).backward(grads[0])
        return x.grad, None, None


class _Network(nn.Module):
    """A frozen first layer and a block, run in one way or another."""

    def __init__(self, way: str, frozen: bool) -> None:
        super().__init__()
        self.way = way
        self.first = nn.Linear(6, 8)
        self.first.requires_grad_(not frozen)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if not hidden.requires_grad:
            hidden.requires_grad_()
        if self.way == "plain":
            found: Tensor = self.block(hidden)
        elif self.way == "checkpoint":
            found = checkpoint(self.block, hidden, use_reentrant=True)
        else:
            found = _Inner.apply(hidden, self.block, self.way == "once")
        return found


def _trainer(name: str, way: str, frozen: bool = True, **options: Any) -> Any:
    options = {"encoder_class": lambda: _Network(way, frozen), "optim_param": {"optim": "sgd", "lr": 0.1}} | options
    trainer: Any = make_trainer(name, **options)
    trainer.model.epoch, trainer.model.epochs = 0, 1
    return trainer


def _run(trainer: Any, steps: int = 3) -> list[Tensor]:
    batch = next(iter(loaders()))
    torch.manual_seed(1)
    for _ in range(steps):
        trainer.step([batch] * trainer.step.batches, StepBuffer())
    return [param.detach().clone() for param in trainer.model.parameters()]


def _check(name: str, way: str, frozen: bool = True, **options: Any) -> None:
    """Compare steps with those of a network whose graph shows everything."""
    start = [param.detach().clone() for param in _trainer(name, way, frozen, **options).model.parameters()]
    got = _run(_trainer(name, way, frozen, **options))
    want = _run(_trainer(name, "plain", frozen, **options))
    for before, one, other in zip(start, got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        if before.dim() == 2 and not (frozen and before.shape == (8, 6)):
            assert (one - before).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("way", ["checkpoint", "inner"])
@pytest.mark.parametrize("name", ["EW", "MGDA", "PCGrad", "Nash_MTL", "MoCo", "FORUM", "MoDo"])
def test_strategies_train_them(name: str, way: str, frozen: bool) -> None:
    _check(name, way, frozen)


OPTIONS: dict[str, dict[str, Any]] = {
    "batched": {"vjps": "batched"},
    "layerwise": {"vjps": "layerwise"},
    "accumulated": {"accumulate": 2},
    "held": {"update_weights_every": 2},
    "representations": {"rep_grad": True},
    "MMoE": {"architecture": "MMoE", "arch_args": {"img_size": [6], "num_experts": [2]}},
    "CGC": {"architecture": "CGC", "arch_args": {"img_size": [6], "num_experts": [1, 1, 1]}},
}


@pytest.mark.parametrize("way", ["checkpoint", "inner"])
@pytest.mark.parametrize("options", OPTIONS)
def test_other_ways_and_architectures_train_them(options: str, way: str) -> None:
    _check("MGDA", way, **OPTIONS[options])


# Of passes without gradients, such as FORUM's.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("way", ["checkpoint", "inner"])
@pytest.mark.parametrize("name", ["EW", "MGDA", "IMTL", "MOML", "FORUM"])
def test_decoders_that_hide_theirs(name: str, way: str) -> None:
    class Decoder(nn.Module):
        def __init__(self, width: int, hides: bool) -> None:
            super().__init__()
            self.layer, self.hides = nn.Sequential(nn.Tanh(), nn.Linear(8, width)), hides

        def forward(self, x: Tensor) -> Tensor:
            if not self.hides:
                found: Tensor = self.layer(x)
            elif way == "checkpoint":
                found = checkpoint(self.layer, x, use_reentrant=True)
            else:
                found = _Inner.apply(x, self.layer, False)
            return found

    def run(hides: bool) -> list[Tensor]:
        torch.manual_seed(2)
        decoders = nn.ModuleDict({"task0": Decoder(3, hides), "task1": Decoder(1, hides)})
        return _run(_trainer(name, "plain", False, decoders=decoders), 1)

    for got, want in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_what_is_multiplied_by_zero_at_first() -> None:
    class Residual(_Network):
        def __init__(self, way: str) -> None:
            super().__init__(way, True)
            self.mid, self.alpha = nn.Linear(8, 8), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).requires_grad_()
            block = self.block(hidden) if self.way == "plain" else _Inner.apply(hidden, self.block, False)
            result: Tensor = self.mid(hidden) + self.alpha * block
            return result

    got, want = (_run(_trainer("MGDA", way, encoder_class=partial(Residual, way)), 6) for way in ("inner", "plain"))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_checkpoints_that_draw_anew_are_trained() -> None:
    class Dropping(_Network):
        def forward(self, x: Tensor) -> Tensor:
            layers = nn.Sequential(self.block, nn.Dropout(0.5))
            hidden = self.first(x).requires_grad_()
            result: Tensor = checkpoint(layers, hidden, use_reentrant=True, preserve_rng_state=False)
            return result

    trainer = _trainer("MGDA", "", encoder_class=lambda: Dropping("", True))
    before = trainer.model.encoder.block[0].weight.detach().clone()
    _run(trainer)
    assert (trainer.model.encoder.block[0].weight != before).any()


def test_inputs_of_their_own() -> None:
    def run(way: str) -> list[Tensor]:
        trainer = _trainer("MGDA", way, multi_input=True)
        data = {task: next(iter(loader)) for task, loader in loaders(multi_input=True).items()}
        inputs, labels = ({task: pair[place] for task, pair in data.items()} for place in (0, 1))
        for _ in range(3):
            trainer.step([(inputs, labels)], StepBuffer())
        return [param.detach().clone() for param in trainer.model.parameters()]

    for got, want in zip(run("checkpoint"), run("plain"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_it_is_told() -> None:
    listener = Listener()
    _run(_trainer("MGDA", "checkpoint", logger=listener))
    assert listener.messages == [
        "each task's backward pass runs through the whole network, as a function of the network runs backward passes "
        "of its own"
    ]


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_that_are_there_once_are_refused(frozen: bool) -> None:
    trainer = _trainer("MGDA", "once", frozen)
    before = [param.detach().clone() for param in trainer.model.parameters()]
    with pytest.raises(UsageError, match="only once per forward pass"):
        _run(trainer)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    _run(_trainer("EW", "once"))


def test_a_function_that_hides_nothing_changes_nothing() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Double.apply(super().forward(x))

    listener = Listener()
    trainer = _trainer("MGDA", "plain", encoder_class=lambda: Doubling(6, 8), logger=listener)
    _run(trainer)
    assert listener.messages == []
    assert trainer.step.engine.method.structure.against_cut is None


def _losses(way: str, frozen: bool = True) -> tuple[Any, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    network = _Network(way, frozen)
    features = network(torch.randn(5, 6))
    return network, features, [features.square().mean(), features.sum()]


CALLS: dict[str, Callable[..., Any]] = {
    "mtl_backward": lambda network, features, losses: mtl_backward(
        losses, features=features, shared_params=network.block.parameters()
    ),
    "mtl_backward of all leaves": lambda network, features, losses: mtl_backward(losses, features=features),
    "backward": lambda network, features, losses: backward(losses, inputs=list(network.block.parameters())),
    "backward of all leaves": lambda network, features, losses: backward(losses),
    "jac": lambda network, features, losses: jac(losses, list(network.block.parameters())),
    "gramian": lambda network, features, losses: Engine(network.block, batch_dim=None).compute_gramian(losses[0]),
    "balance": lambda network, features, losses: fastmtl.balance(losses, shared=network.block, weighting=UPGrad()),
    "balanced": lambda network, features, losses: fastmtl.balanced(losses, shared=network.block).backward(),
}


@pytest.mark.parametrize("call", CALLS)
def test_loops_of_ones_own_refuse_checkpoints(call: str) -> None:
    network, features, losses = _losses("checkpoint")
    with pytest.raises(UsageError, match="use_reentrant must be False"):
        CALLS[call](network, features, losses)
    assert all(param.grad is None for param in network.parameters())


@pytest.mark.parametrize("call", [name for name in CALLS if name.endswith("all leaves")])
def test_loops_of_ones_own_refuse_backward_passes_inside(call: str) -> None:
    network, features, losses = _losses("inner", frozen=False)
    with pytest.raises(UsageError, match="runs a backward pass of its own"):
        CALLS[call](network, features, losses)
    assert all(param.grad is None for param in network.block.parameters())


@pytest.mark.parametrize("call", ["jac", "gramian"])
def test_loops_of_ones_own_warn_of_what_may_hide(call: str) -> None:
    network, features, losses = _losses("inner")
    with pytest.warns(UserWarning, match=r"does not reach a tensor of .*, of shape \(8, 8\).*if _Inner uses it"):
        CALLS[call](network, features, losses)
    assert all(param.grad is None for param in network.parameters())


def test_a_checkpoint_beside_the_way_is_no_harm() -> None:
    torch.manual_seed(0)
    layer, head = nn.Linear(3, 3), nn.Linear(3, 1)
    hidden = checkpoint(layer, torch.randn(4, 3).requires_grad_(), use_reentrant=True)
    (found,) = jac(head(hidden).sum(), head.weight)
    torch.testing.assert_close(found[0, 0], hidden.sum(0).detach())
