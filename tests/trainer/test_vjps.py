"""The ways the tasks' gradients go through the shared network: all give the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmtl import ops
from fastmtl.distributed import Alone
from fastmtl.distributed.comm import DataParallel
from fastmtl.engine.jacobian import BatchGradients
from fastmtl.engine.methods.batched import Batched
from fastmtl.engine.methods.layerwise import Layerwise
from fastmtl.engine.methods.split import Split
from fastmtl.errors import UsageError
from fastmtl.trainer.compile.engines import engines_to_try
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.toy import Listener, batch_of, fill_grads, flat, force_way, loaders, make_trainer, method_of

WAYS = ["batched", "layerwise"]
TASKS = 3


class _Tied(nn.Module):
    """A linear layer called once, whose weight is used a second time without the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 64), nn.Linear(64, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(self.last(self.first(inputs)).tanh(), self.last.weight)


class _Sequence(nn.Module):
    """A linear layer on (B, 2, 64), and one without a bias that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.twice = nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        wide = self.wide(self.first(inputs.unflatten(1, (2, 3))).relu())
        return self.twice(self.twice(wide).tanh()).sum(1)


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(5, 16), nn.Linear(96, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.table(inputs.abs().long() % 5).flatten(1))


class _Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 64), nn.Linear(64, 64)
        self.last.register_forward_hook(lambda module, args, output: 2 * output)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(inputs).tanh())


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 64, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.cell(inputs.unflatten(1, (8, 8)))[0][:, -1].neg()
        return found


def _mlp(*between: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(6, 64), *(make() for make in between), nn.ReLU(inplace=True), nn.Linear(64, 64, bias=False), nn.Tanh()
    )


@pytest.fixture(autouse=True)
def _all_layers_leave_the_direct_way(monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "compressed")


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp(),
    "batch-norm": _mlp(lambda: nn.BatchNorm1d(64)),
    "layer-norm": _mlp(lambda: nn.LayerNorm(64)),
    "dropout": _mlp(lambda: nn.Dropout(0.5)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 12, 1), nn.GELU(), nn.Flatten(), nn.Linear(72, 64)
    ),
    "embedding": _Words,
    "sequence": _Sequence,
    "tied": _Tied,
    "hooked": _Hooked,
    "recurrent": _mlp(_Recurrent),
}


def _trainer(encoder: Callable[[], nn.Module], vjps: str, weighting: str = "MGDA", **options: Any) -> Any:
    count = options.pop("count", TASKS)
    torch.manual_seed(0)
    decoders = nn.ModuleDict({f"task{t}": nn.Linear(64, 1 if t % 2 else 3) for t in range(count)})
    return make_trainer(weighting, "HPS", count, encoder_class=encoder, decoders=decoders, vjps=vjps, **options)


def _batch(count: int = TASKS) -> Any:
    return next(iter(loaders(count)))


def _pass(trainer: Any, inputs: Any, labels: Any) -> BatchGradients:
    """The forward pass and the VJPs of a batch."""
    found: BatchGradients = trainer.step.engine.method(batch_of(trainer, inputs, labels))
    return found


def _grads(trainer: Any, batches: Any) -> dict[str, Tensor | None]:
    """The gradients of one step, which moves nothing."""
    torch.manual_seed(5)
    fill_grads(trainer, batches)
    return {name: param.grad for name, param in trainer.model.named_parameters()}


def _assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None], tolerance: float) -> None:
    # A bias before batch norm has a gradient that is zero but for rounding.
    whole = torch.cat([grad.flatten() for grad in want.values() if grad is not None]).norm()
    assert whole > 0
    for name, grad in want.items():
        found = got[name]
        assert (found is None) == (grad is None), name
        if grad is not None and found is not None:
            assert (found - grad).norm() <= tolerance * (grad.norm() + 0.01 * whole), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weighting", ["MGDA", "Nash_MTL"])
@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("way", WAYS)
def test_the_gradients_are_those_of_one_after_the_other(
    way: str, encoder: Callable[[], nn.Module], weighting: str, dtype: torch.dtype
) -> None:
    inputs, labels = _batch()
    given = (
        inputs.to(dtype),
        {task: each.to(dtype) if each.is_floating_point() else each for task, each in labels.items()},
    )
    found = []
    for vjps in ("sequential", way):
        trainer = _trainer(encoder, vjps, weighting)
        trainer.model.to(dtype)
        found.append(_grads(trainer, [given]))
    _assert_same(found[1], found[0], 1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize(("way", "kind"), [("sequential", Split), ("batched", Batched), ("layerwise", Layerwise)])
def test_the_way_asked_for_is_gone(way: str, kind: type) -> None:
    listener = Listener()
    trainer = _trainer(ENCODERS["mlp"], way, logger=listener)
    assert type(trainer.step.engine.method) is kind
    done = _pass(trainer, *_batch())
    places = {row[0].untyped_storage().data_ptr() for row in done.rows}
    assert len(places) == (1 if way == "batched" else TASKS)
    plans = ["vjps: layer by layer, 2 compressed, 0 direct; cotangents kept (0.0246 MB in float32)"]
    assert listener.messages == (plans if way == "layerwise" else [])


def test_layerwise_rows_have_the_jacobians_gram_matrix_and_less_numbers() -> None:
    inputs, labels = _batch()
    # Rows that depend on each other have no factor in exact arithmetic.
    inputs = inputs[:1].expand_as(inputs).clone()
    passes = {way: _pass(_trainer(ENCODERS["mlp"], way), inputs, labels) for way in ("sequential", "layerwise")}
    want, got = (ops.gram(each.rows) for each in passes.values())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.diagonal().max()))
    sizes = {way: sum(grad.numel() for grad in each.rows[0]) for way, each in passes.items()}
    # The weights, 64 x 6 and 64 x 64, become 8 examples' 64 numbers.
    assert sizes["sequential"] - sizes["layerwise"] == 64 * 6 + 64 * 64 - 2 * 8 * 64


class _ByName(nn.Module):
    """A linear layer that is called with its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(input=inputs).relu()


def test_layerwise_layers_that_are_called_by_name_are_differentiated_as_ever() -> None:
    updates = []
    for way in ("sequential", "layerwise"):
        trainer = make_trainer("MGDA", encoder_class=_ByName, vjps=way)
        trainer.step([next(iter(loaders()))], StepBuffer())
        updates.append(flat(trainer.model.parameters()))
    torch.testing.assert_close(*updates)


@pytest.mark.parametrize("inplace", [False, True])
def test_layerwise_layers_before_an_operation_in_place(inplace: bool) -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(60, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.relu(self.first(x.repeat(1, 10)[:, None]), inplace=inplace)
            return self.second(hidden).mean(1)

    grams = []
    for way in ("sequential", "layerwise"):
        torch.manual_seed(0)
        trainer = make_trainer("MGDA", count=3, encoder_class=Sequences, vjps=way)
        buffer = StepBuffer()
        trainer.step([next(iter(loaders(3)))], buffer)
        grams.append(buffer.flush(0, 1).gram[0])
    torch.testing.assert_close(grams[1], grams[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("option", [{"tasks_per_step": 2}, {"update_weights_every": 2}, {"clip_grad_norm": 0.1}, {}])
def test_training_is_the_same(way: str, option: dict[str, Any]) -> None:
    """Batches lack the labels of a task now and then."""

    def batches() -> list[Any]:
        found = list(loaders(rows=40))
        del found[1][1]["task0"]
        found[2][1]["task1"][3] = torch.nan
        return found

    ends = []
    for vjps in ("sequential", way):
        trainer = _trainer(ENCODERS["mlp"], vjps, count=2, **option)
        trainer.train(batches(), loaders(), 2)
        ends.append(torch.cat([param.detach().flatten() for param in trainer.model.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def test_batches_are_accumulated() -> None:
    batches = list(loaders(TASKS))[:2]
    want, got = (_grads(_trainer(ENCODERS["mlp"], way, accumulate=2), batches) for way in ("sequential", "batched"))
    _assert_same(got, want, 1e-4)


def test_batched_in_bfloat16() -> None:
    want, got = (
        _grads(_trainer(ENCODERS["layer-norm"], way, precision="bf16"), [_batch()]) for way in ("sequential", "batched")
    )
    _assert_same(got, want, 2e-2)


class _Stubborn(torch.autograd.Function):
    """Its backward pass reads a number on the host, which a batch of gradients does not have."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (2.0 if grads[0].sum().item() == 1.25 else 1.0)


class _NoRule(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = _Stubborn.apply(inputs)
        return found


def test_what_cannot_be_batched_comes_one_after_the_other() -> None:
    listener = Listener()
    encoder, batch = _mlp(_NoRule), _batch()
    trainer = _trainer(encoder, "batched", logger=listener)
    want = _grads(_trainer(encoder, "sequential"), [batch])
    for _ in range(2):
        trainer.model.zero_grad()
        _assert_same(_grads(trainer, [batch]), want, 1e-6)
    assert not trainer.step.engine.possible
    assert len(listener.messages) == 1
    assert "cannot be batched" in listener.messages[0]


@pytest.mark.parametrize("known", [True, False])
def test_layerwise_rows_that_cannot_be_batched(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr("fastmtl.engine.layerwise.vjps.batches_well", lambda features: True)
    encoder, batch = _mlp(_NoRule), _batch()
    want = _grads(_trainer(encoder, "sequential"), [batch])
    _assert_same(_grads(_trainer(encoder, "layerwise"), [batch]), want, 1e-4)


@pytest.mark.parametrize("count", [3, 4, 9])
def test_layerwise_rows_come_in_the_order_of_the_tasks(count: int) -> None:
    batch = _batch(count)
    passes = [_pass(_trainer(ENCODERS["mlp"], way, count=count), *batch) for way in ("sequential", "layerwise")]
    torch.testing.assert_close(*(ops.gram(each.rows) for each in passes), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_batched_is_not_among_the_candidates_that_are_timed() -> None:
    listener = Listener()
    trainer = _trainer(_mlp(_NoRule), "auto", count=8, logger=listener)
    assert not trainer.step.trial.settled
    assert "batched" in trainer.step.trial.names
    steps = 0
    while not trainer.step.trial.settled:
        trainer.step([_batch(8)], StepBuffer())
        steps += 1
    (verdict,) = [message for message in listener.messages if message.startswith("a step takes")]
    assert "batched" not in verdict
    assert steps == 13 * verdict.count(" ms") + 2


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 64, 6), nn.Flatten())


@pytest.mark.parametrize(
    ("way", "options", "reason"),
    [
        ("batched", {"weighting": "EW"}, "does not have one VJP per task"),
        ("batched", {"rep_grad": True}, "does not have one VJP per task"),
        ("layerwise", {"weighting": "MoCo"}, "more than a Gram matrix"),
        ("layerwise", {"accumulate": 2}, "accumulated"),
    ],
)
def test_what_cannot_be_is_said(way: str, options: dict[str, Any], reason: str) -> None:
    listener = Listener()
    given = {"encoder": ENCODERS["mlp"], **options}
    trainer = _trainer(given.pop("encoder"), way, logger=listener, **given)
    assert not isinstance(method_of(trainer), Batched | Layerwise)
    assert len(listener.messages) == 1
    assert listener.messages[0].startswith("vjps: one after the other, as ")
    assert reason in listener.messages[0]


def test_a_network_compiled_before_is_not_compressed() -> None:
    listener = Listener()
    compiled: Any = torch.compile(ENCODERS["mlp"](), backend="eager")
    trainer = _trainer(lambda: compiled, "layerwise", logger=listener)
    assert type(trainer.step.engine.method) is Split
    assert listener.messages[-1] == "vjps: one after the other, as parts of the network are compiled"


@pytest.mark.slow
@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize("way", ["batched", "layerwise"])
def test_compiling_leaves_the_trunk_eager_where_its_vjps_have_a_way_of_their_own(way: str) -> None:
    listener = Listener()
    trainer = _trainer(ENCODERS["mlp"], way, compile=True, logger=listener)
    assert type(trainer.step.engine.method) is {"batched": Batched, "layerwise": Layerwise}[way]
    trainer.train(loaders(TASKS), loaders(TASKS), 2)
    assert [message.split()[1] for message in listener.messages if message.startswith("compiling")] == ["heads"]
    assert trainer.compile_report.regions == ["heads"]
    assert trainer.compile_report.graph_breaks == 0


@pytest.mark.slow
@pytest.mark.usefixtures("eager_kernels")
def test_compiled_steps_of_many_tasks_measure_the_ways_too() -> None:
    listener = Listener()
    trainer = _trainer(ENCODERS["mlp"], "auto", count=8, compile=True, logger=listener)
    for batch in loaders(8, rows=8 * 46):
        trainer.step([batch], StepBuffer())
    assert trainer.step.trial.settled
    assert trainer.step.engine.regions.compiled
    decision = listener.messages[-1]
    assert all(f" {way} " in decision for way in ("compiled", "batched", "layerwise")), decision
    # The heads are one region, whichever way the trunk takes.
    assert sum(message.startswith("compiling heads") for message in listener.messages) == 1


class _LowPrecision(nn.Module):
    """Asks for a low precision by itself; the first layer's input is in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 64), nn.Linear(64, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = self.last(self.first(inputs).float().tanh())
        return found.float()


@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_asks_for_low_precision_itself(way: str) -> None:
    want, got = (_trainer(_LowPrecision, vjps) for vjps in ("sequential", way))
    _assert_same(_grads(got, [_batch()]), _grads(want, [_batch()]), 1e-2)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(UsageError, match="vjps"):
        _trainer(ENCODERS["mlp"], "parallel")


def test_auto_is_sequential_with_few_tasks() -> None:
    trainer = _trainer(ENCODERS["mlp"], "auto")
    assert trainer.step.trial.settled
    assert type(trainer.step.engine.method) is Split


@pytest.mark.parametrize("vjps", ["auto", "batched", "layerwise"])
def test_several_processes_take_one_after_the_other(vjps: str) -> None:
    step = _trainer(ENCODERS["mlp"], "sequential", count=8).step
    said: list[str] = []
    options = replace(step.options, vjps=vjps)
    comm = DataParallel(Alone(), step.problem.shared_params, step.problem.task_params)
    engines = engines_to_try(step.strategy, step.problem, step.hyper, options, said.append, comm)
    assert [type(engine.method) for engine in engines.values()] == [Split]
    assert len(said) == (0 if vjps == "auto" else 1)


def test_what_is_captured_is_not_tried_first() -> None:
    trainer = _trainer(ENCODERS["mlp"], "auto", count=8, cuda_graph=True)
    assert trainer.step.trial.settled
    assert type(trainer.step.engine.method) is Split


def test_auto_batches_nothing_that_is_known_not_to_gain() -> None:
    listener = Listener()
    trainer = _trainer(ENCODERS["convolution"], "auto", count=8, logger=listener)
    batched = trainer.step.trial.engines[trainer.step.trial.names.index("batched")]
    batched.method(batch_of(trainer, *_batch(8)))
    assert not batched.possible
    assert "do not gain" in listener.messages[0]


def test_on_cuda_batched_convolutions_are_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(ENCODERS["convolution"], "sequential")
    step, batch = trainer.step, batch_of(trainer, *_batch())
    with monkeypatch.context() as patch:
        patch.setattr(step.problem.model, "device", torch.device("cuda"))
        tried = replace(step.options, vjps="auto")
        engines: Any = engines_to_try(step.strategy, step.problem, step.hyper, tried, pytest.fail, step.comm)
    assert list(engines) == ["eager", "batched", "layerwise"]
    batched = engines["batched"].method
    got, want = batched(batch), step.engine.method(batch)
    assert batched.possible
    for row, expected in zip(got.rows, want.rows, strict=True):
        torch.testing.assert_close(flat(row), flat(expected))


def test_auto_measures_with_many_tasks_and_training_is_the_same() -> None:
    listener, count = Listener(), 8
    ends = []
    for vjps in ("auto", "sequential"):
        trainer = _trainer(ENCODERS["mlp"], vjps, count=count, logger=listener if vjps == "auto" else None)
        buffer = StepBuffer()
        for _ in range(5):
            for batch in loaders(count, rows=72):
                trainer.step([batch], buffer)
        assert trainer.step.trial.settled
        ends.append(torch.cat([param.detach().flatten() for param in trainer.model.parameters()]))
    layers, verdict = listener.messages
    assert layers.startswith("vjps: layer by layer, 2 compressed")
    assert verdict.startswith("a step takes eager ")
    assert "batched" in verdict
    assert "layerwise" in verdict
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)


class _Clock:
    """Time that goes by as it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("kind", ["held", "few tasks", "few batches"])
def test_short_steps_say_nothing_about_the_ways(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, listener, count = _Clock(), Listener(), 8
    monkeypatch.setattr("fastmtl.trainer.compile.trial.time", clock)
    options: dict[str, Any] = {"held": {"update_weights_every": 2}, "few batches": {"accumulate": 2}}.get(kind, {})
    trainer = _trainer(ENCODERS["mlp"], "auto", count=count, logger=listener, **options)
    batch = next(iter(loaders(count)))
    seconds = {Split: 0.5, Batched: 0.1, Layerwise: 0.2}
    trial = trainer.step.trial
    for step in range(200):
        short = step % 2 == 1
        few = short and kind == "few tasks"
        trainer.step([batch] * (1 if short else trainer.step.batches), StepBuffer(), [0, 1] if few else None)
        if trainer.step.trial.settled:
            break
        clock.now += 0.01 if short else seconds[type(trainer.step.engine.method)]
    assert trial.chosen == "batched"
    assert "eager 500.0 ms, batched 100.0 ms" in listener.messages[-1]


def test_a_trial_ends_if_no_step_is_of_all_tasks() -> None:
    listener = Listener()
    trainer = _trainer(ENCODERS["mlp"], "auto", count=8, logger=listener)
    batch = next(iter(loaders(8)))
    for _ in range(400):
        trainer.step([batch], StepBuffer(), [0, 1])
    assert trainer.step.trial.settled
    assert listener.messages == ["too few steps are whole ones to measure by: going on eager"]


def test_a_resumed_run_keeps_the_way_it_had_chosen(tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> Any:
        trainer = make_trainer("MGDA", count=8, **options)
        trainer.train(loaders(8, rows=8 * 42), loaders(8), epochs)
        return trainer

    first = run(1, save_path=str(tmp_path))
    assert first.step.trial.settled
    told = Listener()
    second = make_trainer("MGDA", count=8, resume=str(tmp_path / "last.pt"), logger=told)
    assert second.step.trial.settled
    assert type(second.step.engine.method) is type(first.step.engine.method)
    assert any(message.endswith("as before") for message in told.messages)
    for trainer in (first, second):
        trainer.step([next(iter(loaders(8)))], StepBuffer())
    assert torch.equal(flat(first.model.parameters()), flat(second.model.parameters()))


class _WithScalar(nn.Module):
    """Features with a scalar beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.layer(inputs).tanh()
        return {"hidden": hidden, "size": hidden.square().mean()}


class _Head(nn.Module):
    """A decoder that reads the scalar or not."""

    def __init__(self, outputs: int, reads: bool) -> None:
        super().__init__()
        self.layer, self.reads = nn.Linear(8, outputs), reads

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = self.layer(features["hidden"])
        return outputs * features["size"] if self.reads else outputs


@pytest.mark.parametrize("vjps", ["sequential", *WAYS])
def test_a_scalar_among_the_features_is_no_loss(vjps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "compressed")
    torch.manual_seed(0)
    decoders = nn.ModuleDict({"task0": _Head(3, True), "task1": _Head(1, False)})
    trainer: Any = make_trainer("MGDA", encoder_class=_WithScalar, decoders=decoders, vjps=vjps)
    trainer.model.double()
    inputs, labels = next(iter(loaders()))
    inputs, labels = inputs.double(), {**labels, "task1": labels["task1"].double()}
    shared = list(trainer.model.get_share_params())
    preds = trainer.model(inputs)
    losses = [trainer.meter.losses[task].compute_loss(preds[task], labels[task]) for task in labels]
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    trainer.step([(inputs, labels)], StepBuffer())
    for k, param in enumerate(shared):
        want = sum(w * row[k] for w, row in zip(trainer.step.latest.weights, rows, strict=True))
        torch.testing.assert_close(param.grad, want, rtol=1e-6, atol=1e-9)
