"""Architectures of recommenders: products of probabilities, information transfer, experts over shared tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.architecture import AITM, ARCHITECTURES, ESMM
from fastmtl.errors import UsageError
from fastmtl.model import Bag, Categorical, FeatureEncoder, FeatureTables, MLPEncoder, Numeric
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.toy import flat, make_trainer, steps_of

FEATURES = [Numeric("age", mean=40.0, std=10.0), Categorical("job", 50, 4, sparse=True), Bag("seen", 60, 5)]
# Of the features' vectors, unlike that of what follows.
WIDTH = 1 + 4 + 5


def make_inputs(rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "age": torch.randn(rows, generator=generator) * 10 + 40,
        "job": torch.randint(50, (rows,), generator=generator),
        "seen": torch.randint(-1, 60, (rows, 4), generator=generator),
    }


def encoder() -> FeatureEncoder:
    return FeatureEncoder(FEATURES, (8, 8))


def build(kind: type[Any], tasks: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    names = [f"task{t}" for t in range(tasks)]
    given = {"encoder_class": encoder, "rep_grad": False, "multi_input": False, "device": torch.device("cpu")}
    decoders = nn.ModuleDict({name: nn.Linear(8, 1) for name in names})
    return kind(task_name=names, decoders=decoders, **{**given, **options})


def test_esmm_predicts_products_of_probabilities() -> None:
    network, inputs = build(ESMM).double(), make_inputs()
    preds, steps = network(inputs), network.conditionals(inputs)
    product = torch.ones(6, 1, dtype=torch.float64)
    for task, logit in preds.items():
        product = product * steps[task].sigmoid()
        torch.testing.assert_close(logit.sigmoid(), product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_esmm_neither_overflows_nor_cancels(dtype: torch.dtype) -> None:
    network = build(ESMM, tasks=2)
    network.decoders["task1"].steps[0] = network.decoders["task1"].steps[1] = nn.Identity()
    logits = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0], dtype=dtype, requires_grad=True)
    joint = network.decoders["task1"](logits)
    # -log((1 + exp(-z))^2 - 1)
    exact = -(2 * torch.logaddexp(torch.zeros(5).double(), -logits.double()) + 0).expm1().log()
    wanted = torch.where(logits.double() > 20, logits.double() - torch.tensor(2.0).log(), exact)
    wanted = torch.where(logits.double() < -20, 2 * logits.double(), wanted)
    torch.testing.assert_close(joint.double(), wanted, rtol=1e-5, atol=1e-5)
    joint.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_esmm_learns_conversions_from_all_impressions() -> None:
    # The gradient of a row without a click reaches the conversion's decoder, weighted by the click's probability.
    network, inputs = build(ESMM, tasks=2), make_inputs()
    loss = nn.functional.binary_cross_entropy_with_logits(network(inputs)["task1"], torch.zeros(6, 1), reduction="sum")
    click = network.conditionals(inputs)["task0"].sigmoid()
    conversion = network.conditionals(inputs)["task1"].sigmoid()
    bias = network.decoders["task1"].steps[1].bias
    (got,) = torch.autograd.grad(loss, bias)
    # d/dz of -log(1 - p q), q = sigmoid(z).
    wanted = (click * conversion * (1 - conversion) / (1 - click * conversion)).sum()
    torch.testing.assert_close(got.squeeze(), wanted)


def test_esmm_needs_logits_of_one_shape() -> None:
    network = build(ESMM, tasks=2)
    network.decoders["task1"].steps[1] = nn.Linear(8, 2)
    with pytest.raises(UsageError, match=r"outputs of one shape, got \(6, 1\) and \(6, 2\)"):
        network(make_inputs())


def test_aitm_passes_on_what_the_task_before_has_learned() -> None:
    network, inputs = build(AITM), make_inputs()
    (rep,) = network.trunk(inputs)
    first = network.towers["task0"](rep)
    assert torch.equal(network.branch((rep,), "task0"), first)
    own, transfer = network.towers["task1"](rep), network.transfers["task1"]
    passed = torch.relu(first @ transfer.passed[0].weight.T + transfer.passed[0].bias)
    scores = [((u @ transfer.query.weight.T) * (u @ transfer.key.weight.T)).sum(1) / 8**0.5 for u in (passed, own)]
    shares = torch.stack(scores).softmax(0)[..., None]
    wanted = shares[0] * (passed @ transfer.value.weight.T) + shares[1] * (own @ transfer.value.weight.T)
    torch.testing.assert_close(network.branch((rep,), "task1"), wanted)
    # The last task's loss trains all towers, the first task's only its own.
    for task, reached in (("task0", 1), ("task2", 3)):
        grads = torch.autograd.grad(network(inputs)[task].sum(), list(network.towers.parameters()), allow_unused=True)
        assert sum(grad is not None for grad in grads) == 2 * reached


@pytest.mark.parametrize("name", ["MMoE", "CGC", "PLE", "DSelect_k"])
def test_experts_share_their_tables(name: str) -> None:
    network = build(ARCHITECTURES[name], num_experts=[3] if name in ("MMoE", "DSelect_k") else [2, 1])
    tables = [key for key, _ in network.named_parameters() if ".tables." in key or key.startswith("bottom")]
    assert tables == ["bottom.tables.0_job.weight", "bottom.tables.1_seen.weight"]
    shared = set(map(id, network.get_share_params()))
    assert all(id(param) in shared for param in network.bottom.parameters())
    calls: list[int] = []
    network.bottom.register_forward_hook(lambda *args: calls.append(1))
    preds = network(make_inputs())
    assert calls == [1]
    assert {pred.shape for pred in preds.values()} == {(6, 1)}
    # Gates read the features' vectors: a number, a category, a bag.
    gates = [
        module
        for key, module in network.named_modules()
        if isinstance(module, nn.Linear) and ("gate" in key or "logits" in key)
    ]
    assert {gate.in_features for gate in gates} == ({WIDTH, 8} if name == "PLE" else {WIDTH})


@pytest.mark.parametrize("name", ["MMoE", "CGC", "PLE", "DSelect_k"])
def test_the_tables_of_all_experts_are_made_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = [], nn.init.normal_

    def record(weight: Tensor, **options: float) -> Tensor:
        drawn.append(weight.shape)
        return draw(weight, **options)

    monkeypatch.setattr(nn.init, "normal_", record)
    network = build(ARCHITECTURES[name], num_experts=[3] if name in ("MMoE", "DSelect_k") else [2, 1])
    assert drawn == [table.weight.shape for table in network.bottom.tables.values()]


class _MoreTables(FeatureEncoder):
    """An encoder with tables behind the shared ones."""

    def __init__(self) -> None:
        super().__init__(FEATURES, (8, 8))
        self.more = FeatureTables([Categorical("job", 50, 8)])


def test_tables_of_an_expert_of_its_own_are_drawn() -> None:
    network = build(ARCHITECTURES["MMoE"], num_experts=[3], encoder_class=_MoreTables)
    for expert in network.experts_shared:
        assert float(expert.more.tables["0_job"].weight.detach().std()) == pytest.approx(8**-0.5, rel=0.2)


def test_experts_share_their_tables_all_or_none() -> None:
    kinds = iter([encoder, lambda: MLPEncoder(WIDTH, [8, 8])])
    with pytest.raises(UsageError, match="encoder_class must return encoders of one kind"):
        build(ARCHITECTURES["MMoE"], num_experts=[2], encoder_class=lambda: next(kinds)())


@pytest.mark.parametrize("weighting", ["EW", "MGDA"])
@pytest.mark.parametrize(
    ("name", "before", "of_task"),
    [
        ("ESMM", ["decoders.task0.steps.0"], ["decoders.task1.steps.1"]),
        ("AITM", ["towers.task0.0"], ["decoders.task1", "towers.task1.0"]),
        ("MMoE", [], ["decoders.task1", "gate_specific.task1.0"]),
    ],
)
def test_a_task_without_labels_moves_for_the_steps_after_it_only(
    name: str, before: list[str], of_task: list[str], weighting: str
) -> None:
    trainer = make_trainer(
        weighting, name, 2, encoder_class=encoder, optim_param={"optim": "sparseadam", "lr": 0.01}, **steps_of(2)
    )
    labels = {"task0": torch.ones(6, 1), "task1": torch.zeros(6, 1)}
    trainer.train([(make_inputs(), labels)], [(make_inputs(), labels)], 1)
    old = {key: param.detach().clone() for key, param in trainer.model.named_parameters()}
    trainer.train([(make_inputs(), {"task1": labels["task1"]})], [(make_inputs(), labels)], 1)
    moved = {
        key.rpartition(".")[0]
        for key, param in trainer.model.named_parameters()
        if key.startswith(("decoders", "towers", "gate")) and not torch.equal(param, old[key])
    }
    assert moved == {*before, *of_task}


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "UPGrad"])
@pytest.mark.parametrize("name", ["HPS", "MMoE", "CGC", "PLE", "ESMM", "AITM"])
def test_every_one_trains_on_features(name: str, weighting: str) -> None:
    options = {"optim_param": {"optim": "sparseadam", "lr": 0.01}, **steps_of(2)}
    trainer = make_trainer(weighting, name, 2, encoder_class=encoder, **options)
    before = flat(trainer.model.parameters())
    clicks = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    labels = {"task0": clicks, "task1": clicks * torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])}
    losses = [
        sum(float(loss) for loss in trainer.step([(make_inputs(), labels)], StepBuffer())[0].values())
        for _ in range(30)
    ]
    assert losses[-1] < losses[0]
    assert not torch.equal(before, flat(trainer.model.parameters()))
