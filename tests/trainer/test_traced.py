"""Forward pass and all VJPs as one graph: the same gradients, and regions where that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmtl.engine.methods.split import Split
from fastmtl.engine.methods.traced import Traced
from fastmtl.errors import UsageError
from fastmtl.model import ConvEncoder
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.test_step import OnePiece
from tests.trainer.toy import Listener, flat, loaders, make_trainer, method_of

TASKS = 3
# Torch's own, while it traces.
pytestmark = [
    pytest.mark.usefixtures("eager_kernels"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -2 * grads[0]


class _Layer(nn.Module):
    """A linear layer, and what is done with it."""

    def __init__(self, then: Callable[[_Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.then = nn.Linear(6, 8), nn.Linear(8, 8), then
        self.register_buffer("seen", torch.zeros(8))
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.then(self, self.first(inputs))


def _count(layer: _Layer, x: Tensor) -> Tensor:
    layer.calls += 1
    return x.tanh() * (1 + 0.1 * layer.calls)


def _remember(layer: Any, x: Tensor) -> Tensor:
    layer.seen += x.detach().mean(0)
    return x.mul_(2).relu_() + 0.1 * layer.seen


def _hooked(layer: _Layer, x: Tensor) -> Tensor:
    x = x.tanh()
    if x.requires_grad:
        x.register_hook(lambda grad: 3 * grad)
    return x


def _without_first() -> nn.Module:
    encoder = _Layer(lambda layer, x: layer.last(x.tanh()))
    encoder.first.requires_grad_(False)
    return encoder


def _words() -> nn.Module:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.bag, self.norm = nn.Embedding(5, 4), nn.EmbeddingBag(5, 4), nn.LayerNorm(8)

        def forward(self, inputs: Tensor) -> Tensor:
            words = inputs.abs().long() % 5
            found: Tensor = self.norm(torch.cat([self.table(words).sum(1), self.bag(words)], 1))
            return found

    return Words()


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "batch-norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True)),
    "buffer, in place": lambda: _Layer(_remember),
    "function of one's own": lambda: _Layer(lambda layer, x: _Reversed.apply(x.tanh())),
    "checkpoint": lambda: _Layer(lambda layer, x: checkpoint(layer.last, x.tanh(), use_reentrant=False)),
    "hook on a feature": lambda: _Layer(_hooked),
    "counts its calls": lambda: _Layer(_count),
    "unused parameters": lambda: _Layer(lambda layer, x: x.tanh()),
    "frozen parameters": _without_first,
    "tied": lambda: _Layer(lambda layer, x: layer.last(layer.last(x).tanh())),
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh()),
    "words": _words,
}


def _trained(vjps: str, encoder: Callable[[], nn.Module], weighting: str = "MGDA", **options: Any) -> Any:
    listener, multi = Listener(), options.get("multi_input", False)
    given = {"architecture": "HPS", "compile": vjps != "sequential", "vjps": vjps, "logger": listener, **options}
    trainer: Any = make_trainer(weighting, count=TASKS, encoder_class=encoder, **given)
    trainer.train(loaders(TASKS, multi_input=multi), loaders(TASKS, multi_input=multi), 1)
    return trainer, listener.messages


def _assert_same_model(a: Any, b: Any) -> None:
    want, got = a.model.state_dict(), b.model.state_dict()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "weighting"),
    [*((encoder, "MGDA") for encoder in ENCODERS.values()), (ENCODERS["tied"], "Nash_MTL")],
    ids=[*ENCODERS, "tied Nash_MTL"],
)
def test_training_is_the_same(encoder: Callable[[], nn.Module], weighting: str) -> None:
    eager, _ = _trained("sequential", encoder, weighting)
    traced, messages = _trained("traced", encoder, weighting)
    assert traced.step.engine.method.traces, messages
    _assert_same_model(eager, traced)
    fresh = make_trainer(weighting, count=TASKS, encoder_class=encoder)
    assert not torch.equal(flat(fresh.model.encoder.parameters()), flat(eager.model.encoder.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"accumulate": 3}, {"precision": "fp16"}, {"weight_momentum": 0.5}], ids=str)
def test_options_of_the_step_work_as_ever(options: dict[str, Any]) -> None:
    eager, _ = _trained("sequential", ENCODERS["tied"], **options)
    traced, messages = _trained("traced", ENCODERS["tied"], **options)
    assert traced.step.engine.method.traces, messages
    _assert_same_model(eager, traced)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["MGDA", "Nash_MTL", "GradVac", "MoCo", "SDMGrad"])
@pytest.mark.parametrize(
    "options", [{"architecture": OnePiece}, {"multi_input": True}], ids=["one piece", "inputs each"]
)
def test_networks_without_a_cut_are_traced_too(options: dict[str, Any], weighting: str) -> None:
    encoder = ENCODERS["unused parameters"]
    eager, _ = _trained("sequential", encoder, weighting, **options)
    traced, messages = _trained("traced", encoder, weighting, **options)
    assert traced.step.engine.method.traces, messages
    _assert_same_model(eager, traced)


def _looks(layer: _Layer, x: Tensor) -> Tensor:
    return x.tanh() if float(x.detach().sum()) < 1e9 else x


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [lambda: _Layer(_looks), lambda: _Layer(_prints)], ids=["reads a value", "prints"])
def test_what_is_no_graph_is_compiled_in_regions_and_says_so(encoder: Callable[[], nn.Module]) -> None:
    eager, _ = _trained("sequential", encoder)
    traced, messages = _trained("traced", encoder)
    assert not traced.step.engine.method.traces
    said = "compile: in regions, as the gradients cannot be in one graph with the rest: "
    assert len([message for message in messages if message.startswith(said)]) == 1
    assert traced.compile_report.regions == ["trunk", "heads"]
    _assert_same_model(eager, traced)


def _prints(layer: _Layer, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x.tanh()


def test_torchs_setting_is_left_as_it_was() -> None:
    import torch._dynamo.config as config

    trainer, _ = _trained("traced", ENCODERS["unused parameters"])
    assert trainer.step.engine.method.traces
    assert config.trace_autograd_ops is False


@pytest.mark.slow
def test_weights_known_beforehand_take_regions() -> None:
    eager, _ = _trained("sequential", ENCODERS["tied"], update_weights_every=2)
    traced, _ = _trained("traced", ENCODERS["tied"], update_weights_every=2)
    assert traced.step.engine.method.traces
    assert traced.step.engine.regions.trunk.graphs == traced.step.engine.regions.gradients.graphs == 1
    _assert_same_model(eager, traced)


def test_a_profile_compiles_nothing_anew(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer: Any = make_trainer(compile=True, vjps="traced", profile=tmp_path / "trace.json")
    trainer.train(loaders(rows=80), loaders(), 1)
    assert trainer.profiler.done
    assert trainer.step.engine.regions.gradients.graphs == 1
    table = capsys.readouterr().out.split("Where the step went")[1]
    assert "traced" in table
    assert "VJPs" not in table


def test_small_networks_without_convolutions_are_traced_without_asking() -> None:
    assert isinstance(make_trainer(compile=True).step.engine.method, Traced)
    auto = make_trainer(compile="auto").step.trial
    assert not auto.settled
    assert [type(engine.method) for engine in auto.engines] == [Split, Traced]
    assert type(make_trainer(compile=True, vjps="sequential").step.engine.method) is Split


def _convolutional() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (6, 1, 1)), ConvEncoder(6, (8,)), nn.Flatten())


def _deep() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *(nn.Linear(8, 8) for _ in range(100)))


@pytest.mark.parametrize("encoder", [_convolutional, _deep, lambda: nn.GRU(6, 8)], ids=["images", "deep", "recurrent"])
def test_other_networks_are_compiled_in_regions(encoder: Callable[[], nn.Module]) -> None:
    assert type(make_trainer(compile=True, encoder_class=encoder).step.engine.method) is Split
    assert type(make_trainer(compile=True, encoder_class=encoder, vjps="traced").step.engine.method) is Traced


def _hook_on_parameter() -> nn.Module:
    layer = nn.Linear(6, 8)
    layer.weight.register_hook(lambda grad: 3 * grad)
    return layer


def _hook_on_layer() -> nn.Module:
    layer = nn.Linear(6, 8)
    layer.register_full_backward_hook(lambda module, given, wanted: None)
    return layer


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"encoder_class": _hook_on_parameter}, "gradients have hooks"),
        ({"encoder_class": _hook_on_layer}, "gradients have hooks"),
        ({"weighting": "EW"}, "does not have one VJP per task"),
        ({"rep_grad": True}, "does not have one VJP per task"),
    ],
    ids=["hook on a parameter", "hook on a layer", "losses only", "rep_grad"],
)
def test_what_cannot_be_traced_says_why(options: dict[str, Any], reason: str) -> None:
    listener = Listener()
    trainer = make_trainer(compile=True, vjps="traced", logger=listener, **options)
    assert not isinstance(method_of(trainer), Traced)
    assert len(listener.messages) == 1
    assert listener.messages[0].startswith("vjps: one after the other, as ")
    assert reason in listener.messages[0]
    assert not isinstance(method_of(make_trainer(compile=True, **options)), Traced)


def test_hooks_that_come_later_are_called() -> None:
    listener, seen = Listener(), []
    trainer: Any = make_trainer(compile=True, logger=listener)
    trainer.train(loaders(), loaders(), 1)
    assert trainer.step.engine.method.traces
    trainer.model.encoder.get_parameter("stages.0.0.weight").register_hook(lambda grad: seen.append(1))
    trainer.train(loaders(), loaders(), 1)
    assert len(seen) == 2 * 3
    assert sum("in regions, as the gradients cannot" in message for message in listener.messages) == 1


def test_a_torch_that_traces_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmtl.trainer.compile.engines.traces_gradients", lambda: False)
    assert type(make_trainer(compile=True).step.engine.method) is Split


def test_tracing_is_a_way_to_compile() -> None:
    with pytest.raises(UsageError, match="vjps='traced' is a way to compile a step: it needs compile=True or 'auto'"):
        make_trainer(vjps="traced")


def test_subsets_of_tasks_and_empty_labels() -> None:
    found = []
    for vjps in ("sequential", "traced"):
        trainer: Any = make_trainer(count=TASKS, compile=vjps == "traced", vjps=vjps)
        trainer.model.epoch = 0
        inputs, labels = next(iter(loaders(TASKS)))
        labels["task1"][:3] = torch.nan
        trainer.step([(inputs, labels)], StepBuffer())
        trainer.step([(inputs, {"task2": labels["task2"]})], StepBuffer(), [2])
        found.append(trainer)
    assert found[1].step.engine.method.traces
    _assert_same_model(*found)
