"""What holds for every architecture, over encoders of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastmtl.architecture import ARCHITECTURES
from fastmtl.errors import UsageError
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.utils import count_improvement
from tests.architecture.networks import ENCODERS, FEATURES, GATED, SPLITS, TASKS, build, make_inputs
from tests.host_reads import NoHostRead
from tests.trainer.toy import flat, loaders, make_trainer, steps_of

STAGED = ["MTAN", "Cross_stitch", "PLE", "LTB"]
SINGLE = ["Cross_stitch", "LTB"]


def fitting(name: str) -> dict[str, Any]:
    """Return the tasks and decoders of an architecture that does not take any."""
    torch.manual_seed(0)
    return steps_of(3) if name == "ESMM" else {}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_encoder_works_or_is_refused(name: str, kind: str) -> None:
    if kind == "whole text" and name in STAGED:
        with pytest.raises(UsageError, match=f"{name} needs an encoder made of stages .* got Text"):
            build(name, kind)
        return
    network = build(name, kind)
    preds = network(make_inputs(kind))
    assert {task: tuple(pred.shape) for task, pred in preds.items()} == dict.fromkeys(TASKS, (4, 3))
    torch.stack([pred.square().mean() for pred in preds.values()]).sum().backward()
    still = [key for key, param in network.named_parameters() if param.grad is None]
    # Without an epoch LTB takes the likeliest choices: the first task's encoder throughout.
    assert still == [] or name == "LTB"


@pytest.mark.parametrize("kind", ["table", "image"])
@pytest.mark.parametrize("name", GATED)
def test_gates_read_flattened_inputs_where_their_size_is_given(name: str, kind: str) -> None:
    inputs = make_inputs(kind)
    network = build(name, kind, img_size=list(inputs.shape[1:]))
    gates = network._z_logits if name == "DSelect_k" else (network.encoder if name == "PLE" else network).gate_specific
    first = next(module for module in gates["task1"].modules() if isinstance(module, nn.Linear))
    assert first.in_features == inputs[0].numel()
    assert network(inputs)["task1"].shape == (4, 3)
    if kind == "image":
        with pytest.raises(UsageError, match="img_size must be the size of one input"):
            network(inputs[..., :-2])


@pytest.mark.parametrize("name", ["MMoE", "CGC", "DSelect_k"])
def test_gates_cannot_read_token_ids(name: str) -> None:
    network = build(name, "whole text", img_size=[9])
    with pytest.raises(UsageError, match=r"img_size must be left out for inputs of torch\.int64"):
        network(make_inputs("text"))


@pytest.mark.parametrize("name", ["MMoE", "CGC", "DSelect_k"])
def test_gates_need_a_size(name: str) -> None:
    with pytest.raises(UsageError, match=r"Gates need img_size.*got no img_size and Linear"):
        build(name, encoder_class=lambda: nn.Linear(6, 8))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_task_is_its_part_of_all(name: str) -> None:
    network, inputs = build(name).eval(), make_inputs("table")
    for task, pred in network(inputs).items():
        alone = network(inputs, task)
        assert list(alone) == [task]
        torch.testing.assert_close(alone[task], pred)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_split_network_is_the_whole_one(name: str, training: bool) -> None:
    network, inputs = build(name, "image").train(training), make_inputs("image")
    assert network.splits == (name in SPLITS)
    if not network.splits:
        return
    whole = network(inputs)
    features = network.trunk(inputs)
    for task in TASKS:
        torch.testing.assert_close(network.decoders[task](network.branch(features, task)), whole[task])
    # The trunk holds shared parameters alone.
    reached = (
        torch.autograd.grad(
            [feature.sum() for feature in features if feature.requires_grad],
            [
                param
                for key, param in network.named_parameters()
                if id(param) not in set(map(id, network.get_share_params()))
            ],
            allow_unused=True,
        )
        if name != "STL"
        else []
    )
    assert all(grad is None for grad in reached)


@pytest.mark.parametrize("rep_grad", [False, True], ids=["params", "rep"])
@pytest.mark.parametrize("multi_input", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_step_combines_the_tasks_own_gradients(name: str, multi_input: bool, rep_grad: bool) -> None:
    options: dict[str, Any] = {"multi_input": multi_input, "optim_param": {"optim": "sgd", "lr": 0.0}}
    if multi_input and name in SINGLE:
        with pytest.raises(UsageError, match=f"{name} .* of one input: multi_input must be False"):
            make_trainer("MGDA", name, 3, **options)
        return
    if name == "STL":
        with pytest.raises(UsageError, match="MGDA balances the gradients of shared parameters, and STL has none"):
            make_trainer("MGDA", name, 3, **options)
        return
    trainer = make_trainer("MGDA", name, 3, rep_grad=rep_grad, **options, **fitting(name))
    given = loaders(3, multi_input=multi_input)
    if multi_input:
        firsts = {task: next(iter(loader)) for task, loader in given.items()}
        batch: Any = {t: x for t, (x, _) in firsts.items()}, {t: y for t, (_, y) in firsts.items()}
    else:
        batch = next(iter(given))
    buffer = StepBuffer()
    trainer.step([batch], buffer)
    weights = buffer.flush(0, 1).weights[0]
    plain = make_trainer("EW", name, 3, **options, **fitting(name))
    plain.model.load_state_dict(trainer.model.state_dict())
    problem, (inputs, labels) = plain.step.problem, batch
    if multi_input:
        losses = [problem.single(inputs[task], labels[task], task)[0] for task in problem.tasks]
    else:
        losses = list(problem.whole(inputs, labels)[0])
    total = sum(float(weight) * loss for weight, loss in zip(weights, losses, strict=True))
    expected = torch.autograd.grad(total, problem.shared_params, retain_graph=True, allow_unused=True)
    for param, want in zip(trainer.step.problem.shared_params, expected, strict=True):
        torch.testing.assert_close(
            param.grad if param.grad is not None else torch.zeros_like(param),
            want if want is not None else torch.zeros_like(param),
            rtol=1e-4,
            atol=1e-6,
        )
    if rep_grad:
        return
    own = torch.autograd.grad(sum(losses), problem.task_params, allow_unused=True)
    for param, want in zip(trainer.step.problem.task_params, own, strict=True):
        torch.testing.assert_close(param.grad, want)


@pytest.mark.parametrize("weighting", ["EW", "MGDA"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reads_nothing_on_the_host(name: str, weighting: str) -> None:
    if name == "STL" and weighting == "MGDA":
        pytest.skip("STL shares nothing")
    trainer = make_trainer(weighting, name, 3, **fitting(name))
    trainer.model.epochs = 2
    batch, buffer = next(iter(loaders(3))), StepBuffer()
    for epoch in range(2):
        trainer.model.epoch = epoch
        trainer.step([batch], buffer)
        with NoHostRead():
            trainer.model.epoch = epoch
            trainer.step([batch], buffer)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "LTB"])
def test_resumes_exactly(name: str, tmp_path: Any) -> None:
    data = loaders(3)

    def run(epochs: int, **more: Any) -> torch.Tensor:
        trainer = make_trainer("EW", name, 3, **more, **fitting(name))
        trainer.train(data, data, epochs)
        return flat([*trainer.model.parameters(), *trainer.model.buffers()])

    run(2, save_path=str(tmp_path))
    assert torch.equal(run(4, resume=str(tmp_path / "last.pt")), run(4))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("PLE", 3), ("DSelect_k", 2)])
def test_compiled_gradients_are_the_eager_ones(name: str, count: int, request: pytest.FixtureRequest) -> None:
    torch.compiler.reset()
    if name == "PLE":
        # Whether torch traces it is asked; what inductor makes of gates shows the other.
        request.getfixturevalue("eager_kernels")
    eager, compiled = (make_trainer("MGDA", name, count, compile=compile) for compile in (False, True))
    compiled.model.load_state_dict(eager.model.state_dict())
    batch = next(iter(loaders(count)))
    for _ in range(2):
        for trainer in (eager, compiled):
            trainer.model.epochs, trainer.model.epoch = 100, 0
            trainer.step([batch], StepBuffer())
        for got, want in zip(compiled.model.parameters(), eager.model.parameters(), strict=True):
            assert (got.grad is None) == (want.grad is None)
            if want.grad is not None:
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)
    regions = [each for each in vars(compiled.step.engine.regions).values() if hasattr(each, "graphs") and each.graphs]
    assert sum(each.graphs for each in regions) == len(regions)


def test_improvement_over_single_task_learning() -> None:
    results = {}
    for name in ("STL", "HPS"):
        trainer = make_trainer("EW", name)
        trainer.train(loaders(), loaders(), 2)
        results[name] = trainer.meter.best_result["result"]
    weight = {task: info["weight"] for task, info in trainer.task_dict.items()}
    (base,), (new,) = results["STL"]["task0"], results["HPS"]["task0"]
    (base_error,), (new_error,) = results["STL"]["task1"], results["HPS"]["task1"]
    want = ((new - base) / base + (base_error - new_error) / base_error) / 2
    assert count_improvement(results["STL"], results["HPS"], weight) == pytest.approx(want)


@pytest.mark.parametrize("name", ["HPS", "MMoE", "CGC", "DSelect_k"])
def test_a_step_on_text(name: str) -> None:
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(72, outputs)) for outputs in (3, 1, 3)]
    decoders = nn.ModuleDict(dict(zip(TASKS, heads, strict=True)))
    trainer = make_trainer("MGDA", name, 3, encoder_class=ENCODERS["whole text"], decoders=decoders)
    labels = next(iter(loaders(3, batch=4)))[1]
    trainer.step([(make_inputs("text"), labels)], StepBuffer())
    assert [key for key, param in trainer.model.named_parameters() if param.grad is None] == []


@pytest.mark.parametrize("name", ["HPS", "CGC"])
def test_a_frozen_encoder_leaves_the_decoders_to_train(name: str) -> None:
    trainer = make_trainer("MGDA", name, 3, encoder_class=lambda: ENCODERS["table"]().requires_grad_(False))
    trainer.step([next(iter(loaders(3)))], StepBuffer())
    assert all(param.grad is not None for param in trainer.model.decoders.parameters())


class Masked(nn.Module):
    """A sequence model that reads a dictionary, as those of transformers do."""

    feature_dim = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.text = ENCODERS["whole text"]()

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return (self.text(inputs["input_ids"]) * inputs["attention_mask"].unsqueeze(2)).mean(1)


@pytest.mark.parametrize("rep_grad", [False, True], ids=["params", "rep"])
@pytest.mark.parametrize("name", ["HPS", "MMoE", "CGC", "DSelect_k", "STL"])
def test_inputs_in_a_dictionary(name: str, rep_grad: bool) -> None:
    words = make_inputs("text")
    batch = {"input_ids": words, "attention_mask": words > 2}, next(iter(loaders(3, batch=4)))[1]
    weighting = "EW" if name == "STL" else "MGDA"
    trainer = make_trainer(weighting, name, 3, encoder_class=Masked, rep_grad=rep_grad)
    trainer.step([batch], StepBuffer())
    assert [key for key, param in trainer.model.named_parameters() if param.grad is None] == []
    if name in ("MMoE", "CGC", "DSelect_k"):
        with pytest.raises(UsageError, match="img_size must be left out for inputs of dict"):
            make_trainer("EW", name, 3, encoder_class=Masked, arch_args={"img_size": [9]}).step([batch], StepBuffer())
