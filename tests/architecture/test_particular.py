"""What is particular to one architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.model._torchvision import import_torchvision
from fastmtl.model.resnet import BasicBlock, ResNet
from fastmtl.trainer.log.records import StepBuffer
from tests.architecture.networks import GATED, TASKS, build, make_inputs
from tests.trainer.toy import loaders, make_trainer


def test_cross_stitch_without_exchange_is_one_network_per_task() -> None:
    stitched, alone, inputs = build("Cross_stitch"), build("STL"), make_inputs("table")
    with torch.no_grad():
        stitched.encoder.cross_unit.copy_(torch.eye(3).expand(2, 3, 3))
    for task in TASKS:
        torch.testing.assert_close(stitched(inputs)[task], alone(inputs)[task])


def test_cross_stitch_mixes_what_the_stages_put_out() -> None:
    network, inputs = build("Cross_stitch"), make_inputs("table")
    units = torch.randn(2, 3, 3)
    with torch.no_grad():
        network.encoder.cross_unit.copy_(units)
    first, second = network.encoder.resnet_layer.values()
    outputs = [layer(inputs) for layer in first]
    for t, rep in enumerate(network.trunk(inputs)):
        mixed = sum(units[0, t, j] * outputs[j] for j in range(3))
        torch.testing.assert_close(rep, second[t](mixed))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["Cross_stitch", "LTB"])
def test_columns_mix_in_low_precision(name: str, precision: str) -> None:
    trainer = make_trainer("MGDA", name, precision=precision)
    trainer.train(loaders(), loaders(), 1)
    assert all(param.isfinite().all() for param in trainer.model.parameters())


class NarrowResNet(ResNet):
    """A ResNet of four blocks that is an eighth as wide as the common ones."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1])
        for module in list(self.modules()):
            for name, each in list(module.named_children()):
                if isinstance(each, nn.Conv2d):
                    inputs = max(each.in_channels // 8, 3)
                    args: Any = (inputs, each.out_channels // 8, each.kernel_size, each.stride, each.padding)
                    setattr(module, name, nn.Conv2d(*args, bias=False))
                elif isinstance(each, nn.BatchNorm2d):
                    setattr(module, name, nn.BatchNorm2d(each.num_features // 8))
        self.feature_dim = 64


RESNETS = {"narrow": NarrowResNet, "torchvision's": lambda: import_torchvision().models.resnet18()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESNETS)
@pytest.mark.parametrize("name", ["MTAN", "Cross_stitch", "PLE", "LTB"])
def test_the_stages_of_any_resnet(name: str, kind: str) -> None:
    network, images = build(name, encoder_class=RESNETS[kind]), torch.randn(2, 3, 32, 32)
    network.decoders = nn.ModuleDict({task: nn.Flatten() for task in TASKS})
    preds = network(images)
    assert {tuple(pred.shape) for pred in preds.values()} == {(2, 64 if kind == "narrow" else 512)}


class Wrapper(nn.Module):
    """A ResNet and layers behind it, as in LibMTL's example for the Office data."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet_network: nn.Module = NarrowResNet()
        self.hidden_layer = nn.Linear(64, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.hidden_layer(self.resnet_network(images).mean((2, 3)))


@pytest.mark.parametrize("rep_grad", [False, True], ids=["params", "rep"])
def test_mtan_in_a_wrapper_shares_one_input(rep_grad: bool) -> None:
    images = torch.randn(4, 3, 32, 32)
    trainer = make_trainer("MGDA", "MTAN", 3, encoder_class=Wrapper, rep_grad=rep_grad)
    preds = trainer.model.eval()(images)
    for task, pred in preds.items():
        torch.testing.assert_close(pred, trainer.model(images, task)[task])
    trainer.model.train()
    labels = next(iter(loaders(3, batch=4)))[1]
    trainer.step([(images, labels)], StepBuffer())
    still = [key for key, param in trainer.model.named_parameters() if param.grad is None]
    assert still == []


class TestLTB:
    def test_the_temperature_falls_from_epoch_to_epoch(self) -> None:
        network = build("LTB")
        network.epochs = 400
        seen = []
        for epoch in (0, 3, 4, 399):
            network.epoch = epoch
            seen.append((network.encoder.choice, network.encoder.tau.item()))
        assert [choice for choice, _ in seen] == ["all", "all", "sample", "sample"]
        assert [tau for _, tau in seen] == pytest.approx([20, 20 / 2, 20 / 5**0.5, 1])

    def test_warm_up_sums_all_branches(self) -> None:
        network, inputs = build("LTB"), make_inputs("table")
        network.epochs, network.epoch = 100, 0
        first, second = network.encoder.resnet_layer.values()
        # The stems, which put out the inputs, are summed too.
        outputs = [layer(3 * inputs) for layer in first]
        torch.testing.assert_close(network.trunk(inputs)[1], second[1](sum(outputs)))

    def test_samples_one_branch_and_trains_the_choice(self) -> None:
        network, inputs = build("LTB"), make_inputs("table")
        network.epochs, network.epoch = 10, 5
        alpha = network.encoder._choose()
        assert alpha.sum(-1).allclose(torch.ones(4, 3))
        assert ((alpha.detach().round() - alpha).abs() < 1e-6).all()
        network(inputs)["task0"].sum().backward()
        assert network.encoder.alpha.grad[2].abs().sum() > 0

    def test_without_an_epoch_takes_the_likeliest_branch(self) -> None:
        network, inputs = build("LTB"), make_inputs("table")
        with torch.no_grad():
            network.encoder.alpha[2, 0] = torch.tensor([0.0, 5.0, 0.0])
        first, second = network.encoder.resnet_layer.values()
        torch.testing.assert_close(network.trunk(inputs)[0], second[0](first[1](inputs)))
        assert torch.equal(network(inputs)["task1"], network(inputs)["task1"])

    def test_the_trainer_tells_it_the_epoch(self) -> None:
        trainer = make_trainer("EW", "LTB", 3)
        trainer.train(loaders(3), loaders(3), 2)
        assert trainer.model.epoch == 1
        assert trainer.model.encoder.choice == "sample"


class TestDSelectK:
    @pytest.mark.parametrize("experts", [2, 3, 4, 5])
    def test_closed_steps_select_at_most_k_experts(self, experts: int) -> None:
        network = build("DSelect_k", num_experts=[experts], num_nonzeros=2)
        with torch.no_grad():
            network._z_logits["task0"].weight.mul_(1e6)
        weights = network.select(torch.randn(50, 8), "task0")
        assert weights.shape == (50, experts)
        assert ((weights > 0).sum(1) <= 2).all()
        assert (weights.sum(1) <= 1 + 1e-6).all()
        if experts in (2, 4):
            torch.testing.assert_close(weights.sum(1), torch.ones(50))

    def test_an_expert_is_selected_by_its_number(self) -> None:
        network = build("DSelect_k", num_experts=[4], num_nonzeros=1)
        for expert, bits in enumerate([(-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)]):
            with torch.no_grad():
                network._z_logits["task1"].weight.zero_()
                network._z_logits["task1"].bias.copy_(torch.tensor(bits))
            selected = network.select(torch.randn(3, 8), "task1")
            assert torch.equal(selected, torch.eye(4)[expert].expand(3, 4))

    @pytest.mark.parametrize("kgamma", [0.5, 1.0, 3.0])
    def test_the_smooth_step_is_as_wide_as_kgamma(self, kgamma: float) -> None:
        network = build("DSelect_k", kgamma=kgamma)
        x = torch.tensor([-kgamma, -kgamma / 2, 0.0, kgamma / 2, kgamma], requires_grad=True)
        steps = network._smooth_step(x)
        torch.testing.assert_close(steps, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
        steps.sum().backward()
        torch.testing.assert_close(x.grad[2], torch.tensor(1.5 / kgamma))
        assert x.grad[[0, 4]].tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"num_experts": [1]}, "num_experts of DSelect_k must be at least 2, got 1"),
            ({"num_nonzeros": 0}, "num_nonzeros must be at least 1 and kgamma above 0, got 0"),
            ({"kgamma": 0.0}, "kgamma above 0, got 2 and 0.0"),
        ],
    )
    def test_bad_values_are_refused(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            build("DSelect_k", **args)


class TestPLE:
    @pytest.mark.parametrize("kind", ["table", "image", "text"])
    def test_the_shared_gate_joins_the_tasks_experts(self, kind: str) -> None:
        for shared_gate in (False, True):
            network = build("PLE", kind, num_experts=[2, 1, 2, 1], shared_gate=shared_gate)
            network(make_inputs(kind))["task0"].sum().backward()
            layers = network.encoder.specific_layer
            reached = [any(p.grad is not None for p in layer["task1"].parameters()) for layer in layers.values()]
            assert reached == [shared_gate] * (len(reached) - 1) + [False]
        gates = network.encoder.gate_shared
        assert [gate[0].out_features for gate in gates] == [6] * len(gates)

    @pytest.mark.parametrize("shared_gate", [False, True])
    def test_inputs_of_ones_own_take_the_same_path(self, shared_gate: bool) -> None:
        single = build("PLE", shared_gate=shared_gate)
        multi = build("PLE", shared_gate=shared_gate, multi_input=True)
        inputs = make_inputs("table")
        for task, pred in single(inputs).items():
            torch.testing.assert_close(multi(inputs, task)[task], pred)

    def test_finding_sizes_leaves_no_trace_in_the_statistics(self) -> None:
        network = build("PLE", "image", img_size=[3, 8, 8])
        assert all(module.training for module in network.modules())
        for key, value in network.state_dict().items():
            assert "running_mean" not in key or not value.any()

    def test_gates_are_as_wide_as_what_they_read(self) -> None:
        network = build("PLE", "image", img_size=[3, 8, 8])
        widths = [gate[0].in_features for gate in network.encoder.gate_specific["task0"]]
        assert widths == [3 * 64, 4 * 64, 6 * 16]


@pytest.mark.parametrize("name", ["CGC", "PLE"])
@pytest.mark.parametrize("given", [[1, 1, 1], [1, 0], [0, 1], [2], []])
def test_numbers_of_experts_must_fit_the_tasks(name: str, given: list[int]) -> None:
    with pytest.raises(UsageError, match=f"num_experts of {name} must be .* each of the 3 tasks"):
        build(name, num_experts=given)


@pytest.mark.parametrize(("given", "counts"), [([2, 1, 3, 2], [1, 3, 2]), ([2, 2], [2, 2, 2])])
def test_each_task_has_its_number_of_experts(given: list[int], counts: list[int]) -> None:
    network = build("CGC", num_experts=given)
    assert len(network.experts_shared) == 2
    assert [len(experts) for experts in network.experts_specific.values()] == counts
    assert [gate[0].out_features for gate in network.gate_specific.values()] == [2 + count for count in counts]


def test_mmoe_takes_a_number_too() -> None:
    assert len(build("MMoE", num_experts=5).experts_shared) == 5
    with pytest.raises(UsageError, match=r"num_experts must be at least 1, got \[0\]"):
        build("MMoE", num_experts=[0])


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_experts": 2.5}, "num_experts must be an integer or a list of them, got 2.5"),
        ({"num_experts": [2, "x"]}, r"num_experts must be an integer or a list of them, got \[2, 'x'\]"),
        ({"img_size": None}, "img_size must be an integer or a list of them, got None"),
        ({"img_size": [3, 0]}, r"img_size must be at least 1 in every dimension, got \[3, 0\]"),
    ],
)
def test_numbers_that_are_none_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(name, **args)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("size", [6, "6", ["6"], torch.Size([6])])
def test_sizes_of_every_form(name: str, size: Any) -> None:
    assert build(name, img_size=size)(make_inputs("table"))["task1"].shape == (4, 3)
