"""What a trainer finds out of a network: where trunk and heads can be cut, and whose its parameters are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.architecture import HPS
from fastmtl.errors import UsageError
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.toy import Listener, count_vjps, encoder, flat, loaders, make_trainer

STRATEGIES = ["EW", "MGDA", "UPGrad", "Nash_MTL", "MoCo"]
WAYS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "batched": {"vjps": "batched"},
    "layerwise": {"vjps": "layerwise"},
    "held": {"update_weights_every": 2},
}


class _Tied(nn.Module):
    """Decodes with the encoder's last layer."""

    def __init__(self, weight: nn.Parameter, width: int) -> None:
        super().__init__()
        self.weight, self.bias = weight, nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        return (features @ self.weight)[:, : len(self.bias)] + self.bias


def _tied() -> dict[str, Any]:
    layer = nn.Linear(6, 8)
    decoders = nn.ModuleDict({"task0": _Tied(layer.weight, 3), "task1": _Tied(layer.weight, 1)})
    return {"encoder_class": lambda: nn.Sequential(layer, nn.Tanh()), "decoders": decoders}


class LastLayer(HPS):
    """Balances the gradients of the last shared layer alone."""

    def get_share_params(self) -> Iterable[nn.Parameter]:
        layers: Any = self.encoder
        return layers[-1].parameters()


def _last_layer() -> dict[str, Any]:
    return {
        "architecture": LastLayer,
        "encoder_class": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)),
    }


def _expected(trainer: Any, batch: Any) -> dict[str, Tensor]:
    """The gradients of the weighted losses by plain autograd, with the weights of the step that was just run."""
    losses = trainer.step.problem.whole(*batch)[0]
    weights = trainer.step.latest.weights
    found = {}
    for params, each in (
        (trainer.step.problem.shared_params, weights.float()),
        (
            trainer.step.problem.task_params,
            torch.ones(len(losses)) if not trainer.model.weighs_heads else weights.float(),
        ),
    ):
        total = sum(weight * loss for weight, loss in zip(each, losses, strict=True))
        for param, grad in zip(params, torch.autograd.grad(total, params, retain_graph=True), strict=True):
            found[next(name for name, own in trainer.model.named_parameters() if own is param)] = grad
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("make", "reason"), [(_tied, "decoders or losses use"), (_last_layer, "leaves out")], ids=["tied", "part"]
)
def test_what_cannot_be_cut_is_differentiated_as_a_whole(
    make: Callable[[], dict[str, Any]], reason: str, way: str
) -> None:
    listener, given = Listener(), make()
    trainer: Any = make_trainer(
        "MGDA",
        given.pop("architecture", "HPS"),
        optim_param={"optim": "sgd", "lr": 0.0},
        logger=listener,
        **given,
        **WAYS[way],
    )
    trainer.model.epoch = 0
    batch = next(iter(loaders()))
    for _ in range(2):
        trainer.step([batch], StepBuffer())
        for name, want in _expected(trainer, batch).items():
            torch.testing.assert_close(trainer.model.get_parameter(name).grad, want, msg=name)
    assert [message for message in listener.messages if "backward pass" in message] == [
        "each task's backward pass runs through the whole network, as "
        f"{trainer.step.engine.method.structure.against_cut}"
    ]
    assert reason in listener.messages[0]


def test_a_network_that_can_be_cut_is() -> None:
    listener = Listener()
    trainer = make_trainer("MGDA", logger=listener)
    trainer.train(loaders(), loaders(), 1)
    assert trainer.step.engine.method.structure.against_cut is None
    assert listener.messages == []


def test_ways_through_the_trunk_are_not_tried_where_there_is_none() -> None:
    listener = Listener()
    layer = nn.Linear(6, 8)
    decoders = nn.ModuleDict({f"task{t}": _Tied(layer.weight, 1 if t % 2 else 3) for t in range(8)})
    trainer = make_trainer(count=8, encoder_class=lambda: layer, decoders=decoders, logger=listener)
    trainer.train(loaders(8, rows=8 * 30), loaders(8), 1)
    verdict = listener.messages[-1]
    assert verdict.startswith("a step takes eager ")
    assert "batched" not in verdict
    assert "layerwise" not in verdict


def test_representations_of_tied_networks_are_refused() -> None:
    trainer = make_trainer("MGDA", rep_grad=True, **_tied())
    with pytest.raises(
        UsageError, match=r"rep_grad must be False here, as decoders or losses use the shared parameter encoder.0.w"
    ):
        trainer.train(loaders(), loaders(), 1)


@dataclass
class _Output(dict[str, Any]):
    """A dictionary whose entries are attributes too, as some libraries' encoders return."""

    out: Tensor
    none: None = None

    def __post_init__(self) -> None:
        self["out"], self["none"] = self.out, self.none


def _wrapped(wrap: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()

        def forward(self, inputs: Tensor) -> Any:
            return wrap(self.inner(inputs))

    return Wrapped


class _Read(nn.Module):
    def __init__(self, read: Callable[[Any], Tensor], width: int) -> None:
        super().__init__()
        self.read, self.last = read, nn.Linear(8, width)

    def forward(self, features: Any) -> Tensor:
        found: Tensor = self.last(self.read(features))
        return found


CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dictionary": (lambda x: {"out": x, "size": 3}, lambda features: features["out"]),
    "lists": (lambda x: [[x, 2 * x], [x, x]], lambda features: features[0] + features[1]),
    "attributes": (_Output, lambda features: features.out + features["out"]),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_features_in_containers_carry_gradients(container: str, strategy: str) -> None:
    wrap, read = CONTAINERS[container]
    decoders = nn.ModuleDict({"task0": _Read(read, 3), "task1": _Read(read, 1)})
    trainer: Any = make_trainer(
        strategy, encoder_class=_wrapped(wrap), decoders=decoders, optim_param={"optim": "sgd", "lr": 0.0}
    )
    trainer.model.epoch = 0
    batch = next(iter(loaders()))
    trainer.step([batch], StepBuffer())
    grads = flat([param.grad for param in trainer.model.encoder.parameters()])
    assert grads.norm() > 0
    if strategy == "MGDA":
        for name, want in _expected(trainer, batch).items():
            torch.testing.assert_close(trainer.model.get_parameter(name).grad, want, msg=name)


@pytest.mark.parametrize("options", [{}, {"compile": True}, {"rep_grad": True}], ids=str)
def test_decoders_that_write_into_the_features_are_refused(options: dict[str, Any]) -> None:
    decoders = nn.ModuleDict(
        {f"task{t}": nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 1 if t % 2 else 3)) for t in range(2)}
    )
    trainer = make_trainer("MGDA", encoder_class=lambda: nn.Linear(6, 8), decoders=decoders, **options)
    with pytest.raises(UsageError, match="A decoder changes the shared features in place"):
        trainer.train(loaders(), loaders(), 1)


def test_representations_are_tensors() -> None:
    wrap, read = CONTAINERS["dictionary"]
    decoders = nn.ModuleDict({"task0": _Read(read, 3), "task1": _Read(read, 1)})
    trainer = make_trainer("MGDA", rep_grad=True, encoder_class=_wrapped(wrap), decoders=decoders)
    with pytest.raises(UsageError, match="rep_grad needs a representation that is a tensor, got a dict"):
        trainer.train(loaders(), loaders(), 1)


@pytest.mark.parametrize("strategy", ["IMTL", "FairGrad"])
def test_heads_are_differentiated_once_where_each_parameter_is_of_one_task(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = make_trainer(strategy, count=4)
    trainer.model.epoch = 0
    batch = next(iter(loaders(4)))
    trainer.step([batch], StepBuffer())
    calls = count_vjps(monkeypatch)
    trainer.step([batch], StepBuffer())
    assert trainer.step.engine.method.structure.owners == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(calls) == 1 + 4


def test_finding_out_leaves_no_trace() -> None:
    found = []
    for strategy in ("EW", "MGDA"):
        trainer: Any = make_trainer(
            strategy, encoder_class=lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        )
        trainer.model.epoch = 0
        torch.manual_seed(3)
        trainer.step([next(iter(loaders()))], StepBuffer())
        found.append([*trainer.model.buffers(), torch.rand(1)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
