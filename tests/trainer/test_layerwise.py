"""Gram matrices layer by layer, against autograd in float64 on the plain network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.architecture import HPS
from fastmtl.engine.weights import Weights
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.toy import Listener, batch_of, flat, force_way, loaders, make_trainer

TASKS = 3
EXACT = ["ghost", "compressed"]


class _Images(nn.Module):
    """Convolutions of two dimensions: strided, dilated, grouped, with rows and columns of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, (3, 2), stride=(1, 2), padding=(2, 1))
        self.grouped = nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 6, 3, padding="same", padding_mode="reflect")
        self.last = nn.Linear(6, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        images = functional.pad(inputs, (0, 24)).view(-1, 1, 5, 6)
        hidden = self.norm(self.grouped(self.first(images).relu_())).relu_()
        last: Tensor = self.last(self.same(hidden).mean((2, 3)))
        return last


class _Signals(nn.Module):
    """Convolutions of one dimension, one of them depthwise, and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 8, 3, padding=1, stride=2)
        self.twice = nn.Conv1d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv1d(8, 8, 2, groups=8)
        self.last = nn.Linear(16, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.twice(self.twice(self.first(inputs[:, None])).tanh()).relu()
        last: Tensor = self.last(self.depthwise(hidden).flatten(1))
        return last


class _Attention(nn.Module):
    """``nn.MultiheadAttention``, which uses its weights functionally, with itself and across."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.across = nn.MultiheadAttention(16, 2, kdim=16, vdim=16)
        self.last = nn.Linear(16, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        words = self.layer(self.first(inputs.unflatten(1, (3, 2)))).transpose(0, 1)
        mixed, _ = self.across(words, words[:2], words[:2], need_weights=True)
        last: Tensor = self.last(mixed.mean(0))
        return last


class _Functional(nn.Module):
    """Weights used without layers: twice as they are, both ways, and once more in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(6, 10) / 3)
        self.twice = nn.Parameter(torch.randn(10, 10) / 3)
        self.mixed = nn.Parameter(torch.randn(10, 10) / 3)
        self.scale = nn.Parameter(torch.randn(10, 10) / 3)
        self.frozen = nn.Parameter(torch.randn(10, 10) / 3, requires_grad=False)
        self.last = nn.Linear(10, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = (torch.addmm(self.plain[0], inputs, self.plain).tanh() @ self.twice).tanh() @ self.twice
        hidden = hidden.tanh() @ self.mixed
        hidden = functional.linear(hidden.tanh(), self.mixed) @ self.frozen
        hidden = functional.linear(hidden.tanh(), self.scale) + self.scale.sum(0)
        last: Tensor = self.last(hidden)
        return last


class _Hooked(nn.Module):
    """Hooks that change gradients, of a weight and of an output, and a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(6, 16), nn.Linear(16, 16)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(16, 64))
        self.first.weight.register_hook(lambda grad: 2 * grad)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.between(self.first(inputs).tanh())
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: 3 * grad)
        last: Tensor = self.last(hidden.tanh())
        return last


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(32, 64, bias=False))


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "images": _Images,
    "signals": _Signals,
    "attention": _Attention,
    "functional": _Functional,
    "hooked": _Hooked,
}
# The weights that are recognised as those of linear layers.
WEIGHTS = {"mlp": 2, "images": 4, "signals": 4, "attention": 7, "functional": 2, "hooked": 0}


def wide_trainer(encoder: Callable[[], nn.Module], vjps: str, weighting: str = "MGDA", **options: Any) -> Any:
    count = options.pop("count", TASKS)
    torch.manual_seed(0)
    decoders = nn.ModuleDict({f"task{t}": nn.Linear(64, 1 if t % 2 else 3) for t in range(count)})
    trainer: Any = make_trainer(weighting, "HPS", count, encoder_class=encoder, decoders=decoders, vjps=vjps, **options)
    trainer.model.train()
    return trainer


def double_batch(
    trainer: Any, dtype: torch.dtype = torch.float64, count: int = TASKS
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs, labels = next(iter(loaders(count)))
    trainer.model.to(dtype)
    cast = {task: label.to(dtype) if label.is_floating_point() else label for task, label in labels.items()}
    return inputs.to(dtype), cast


def plain_rows(trainer: Any, inputs: Tensor, labels: Mapping[str, Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The T gradients of the shared parameters by autograd on the plain network, and the parameters."""
    shared = [param for param in trainer.model.get_share_params() if param.requires_grad]
    torch.manual_seed(5)
    preds = trainer.model(inputs)
    losses = [trainer.meter.losses[task].compute_loss(preds[task], labels[task]) for task in labels]
    rows = [torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in losses]
    return [[torch.zeros_like(p) if g is None else g for g, p in zip(row, shared, strict=True)] for row in rows], shared


def gram_of(rows: list[list[Tensor]]) -> Tensor:
    matrix = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    return matrix @ matrix.T


@pytest.mark.parametrize("cotangents", ["keep", "recompute"])
@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("name", ENCODERS)
def test_gram_matrix_and_update_are_those_of_the_plain_network(
    name: str, way: str, cotangents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_way(monkeypatch, way)
    trainer = wide_trainer(ENCODERS[name], "layerwise", "Nash_MTL", cotangents=cotangents)
    batch = double_batch(trainer)
    method = trainer.step.engine.method
    torch.manual_seed(5)
    done = method(batch_of(trainer, *batch))
    rows, shared = plain_rows(trainer, *batch)
    assert list(method.vjps.plan.ways.values()) == [way] * WEIGHTS[name]
    gram = done.pullback.gram(done.rows, None, method.comm, None)
    torch.testing.assert_close(gram, gram_of(rows), rtol=1e-9, atol=1e-12 * float(gram_of(rows).max()))
    weights = torch.tensor([0.3, 1.0, -2.0], dtype=torch.float64)
    done.pullback.write(Weights(shared=weights), done, method.comm, ())
    for k, param in enumerate(shared):
        want = sum(w * row[k] for w, row in zip(weights, rows, strict=True))
        assert param.grad is not None
        torch.testing.assert_close(param.grad, want, rtol=1e-9, atol=1e-12)


def test_layers_in_a_checkpoint_and_frozen_ones_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "compressed")

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.frozen, self.inside, self.last = (nn.Linear(n, 16) for n in (6, 16, 16, 16))
            self.frozen.requires_grad_(False)
            self.wide = nn.Linear(16, 64)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.frozen(self.first(inputs).tanh())
            hidden = torch.utils.checkpoint.checkpoint(lambda x: self.inside(x).tanh(), hidden, use_reentrant=False)
            wide: Tensor = self.wide(self.last(hidden))
            return wide

    trainer = wide_trainer(Checkpointed, "layerwise", cotangents="keep")
    batch = double_batch(trainer)
    done = trainer.step.engine.method(batch_of(trainer, *batch))
    names = {param: name for name, param in trainer.model.named_parameters()}
    found = {names[weight] for weight in trainer.step.engine.method.vjps.plan.ways}
    assert found == {"encoder.first.weight", "encoder.last.weight", "encoder.wide.weight"}
    gram = done.pullback.gram(done.rows, None, trainer.step.comm, None)
    torch.testing.assert_close(gram, gram_of(plain_rows(trainer, *batch)[0]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cotangents", ["auto", "recompute"])
def test_groups_of_parameters_have_matrices_and_weights_of_their_own(
    cotangents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_way(monkeypatch, "ghost")
    ends = []
    for vjps in ("sequential", "layerwise"):
        trainer = wide_trainer(
            _mlp, vjps, "GradVac", weight_args={"GradVac_group_type": 1, "GradVac_beta": 0.5}, cotangents=cotangents
        )
        batch = double_batch(trainer)
        for _ in range(3):
            torch.manual_seed(5)
            trainer.step([batch], StepBuffer())
        ends.append(flat(trainer.model.parameters()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-12)


def test_a_plan_that_changes_nothing_is_said_and_left() -> None:
    listener = Listener()
    trainer = wide_trainer(_mlp, "layerwise", logger=listener)
    trainer.step([next(iter(loaders(TASKS)))], StepBuffer())
    assert listener.messages == ["vjps: no layer would gain by going another way than the direct one"]
    assert not trainer.step.engine.possible


class _Masked(nn.Module):
    """Its trunk hands on a mask too, and nothing comes through its dead layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dead, self.last = nn.Linear(6, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 64)

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.first(inputs).tanh()
        hidden = hidden + self.dead(hidden * 0)
        return self.last(hidden), inputs > 0


@pytest.mark.parametrize("way", [*EXACT, "sketched"])
def test_features_without_gradients_and_inputs_of_zeros(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, way)

    class Network(HPS):
        def trunk(self, inputs: Any, task_name: str | None = None) -> Any:
            return self.encoder(inputs)

        def branch(self, features: Any, task: str) -> Any:
            return features[0] * features[1].sum(1, keepdim=True).clamp(max=1)

    decoders = nn.ModuleDict({f"task{t}": nn.Linear(64, 1 if t % 2 else 3) for t in range(TASKS)})
    vjps = "sketch" if way == "sketched" else "layerwise"
    trainer: Any = make_trainer(
        "MGDA", Network, TASKS, encoder_class=_Masked, decoders=decoders, vjps=vjps, cotangents="keep"
    )
    batch = double_batch(trainer)
    rows, shared = plain_rows(trainer, *batch)
    trainer.step([batch], StepBuffer())
    assert list(trainer.step.engine.method.vjps.plan.ways.values()) == [way] * 3
    latest = trainer.step.latest
    torch.testing.assert_close(latest.gram, gram_of(rows), rtol=1e-9, atol=1e-12)
    for k, param in enumerate(shared):
        want = sum(w * row[k] for w, row in zip(latest.weights, rows, strict=True))
        torch.testing.assert_close(param.grad, want, rtol=2e-5, atol=1e-7)
