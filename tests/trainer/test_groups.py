"""Groups of shared parameters have Gram matrices, solves and weights of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmtl.engine.groups import settled_groups
from fastmtl.errors import UsageError
from fastmtl.trainer.log.jsonl import JsonlLogger
from fastmtl.trainer.log.plot import PlotLogger
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.log.tensorboard import TensorBoardLogger
from fastmtl.weighting import MGDA, WEIGHTINGS, AbsWeighting, Weights
from fastmtl.weighting.PCGrad import RandomOrders
from tests.trainer.grouped import TASKS, Blocks, Chain, Counts, batches_of, double_trainer
from tests.trainer.toy import fill_grads, flat, loaders, make_trainer

GRAM = sorted(name for name, rule in WEIGHTINGS.items() if rule.needs == "gram" and not rule.against_groups)
LAYERS = ["encoder.stages.0.0", "encoder.stages.1.0"]


def rows_of(trainer: Any, batches: list[Any]) -> list[list[Tensor]]:
    """The gradients of each task of each batch, by plain autograd."""
    shared = [param for param in trainer.model.get_share_params() if param.requires_grad]
    rows = []
    for inputs, labels in batches:
        preds = trainer.model(inputs)
        for task in trainer.task_name:
            loss = trainer.task_dict[task]["loss_fn"].compute_loss(preds[task], labels[task])
            rows.append(list(torch.autograd.grad(loss, shared, retain_graph=True)))
    return rows


@pytest.mark.parametrize("name", GRAM)
def test_each_group_has_what_the_rule_gives_it_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, so that what is remembered of each group counts."""
    orders = torch.rand(TASKS, TASKS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    monkeypatch.setattr(RandomOrders, "draw_orders", lambda self, like: orders)
    trainer = double_trainer(name)
    # A rule of one Gram matrix for each group, never told of groups.
    alone = [double_trainer(name, groups="all") for _ in LAYERS]
    for _ in range(2):
        batches = batches_of(trainer)
        rows = rows_of(trainer, batches)
        losses = torch.stack([torch.zeros(TASKS, dtype=torch.float64) for _ in batches]).squeeze(0)
        fill_grads(trainer, batches)
        shared = [param for param in trainer.model.get_share_params() if param.requires_grad]
        assert trainer.model.grouping.names == LAYERS
        assert trainer.model.grouping.of == [0, 0, 1, 1]
        total = 0.0
        wants: list[Tensor] = []
        for place, other in enumerate(alone):
            columns = [k for k, group in enumerate(trainer.model.grouping.of) if group == place]
            matrix = torch.stack([torch.cat([row[k].flatten() for k in columns]) for row in rows])
            with torch.no_grad():
                weights = other.model.weigh(losses, matrix @ matrix.T, **other.kwargs["weight_args"])
            update = weights.shared.double() @ matrix
            total += float(update.square().sum())
            wants += [
                part.view_as(shared[k]) for part, k in zip(_parted(update, shared, columns), columns, strict=True)
            ]
            most = weights.max_norm
        scale = 1.0 if most is None else min(1.0, most / (total**0.5 + 1e-6))
        for param, want in zip(shared, wants, strict=True):
            torch.testing.assert_close(param.grad, want * scale, rtol=1e-7, atol=1e-10)


def _parted(update: Tensor, shared: list[Tensor], columns: list[int]) -> tuple[Tensor, ...]:
    return update.split([shared[k].numel() for k in columns])


def test_heads_get_the_mean_of_the_groups() -> None:
    trainer = double_trainer("Nash_MTL", weight_args={"max_norm": 0.0})
    batches = batches_of(trainer)
    (inputs, labels) = batches[0]
    preds = trainer.model(inputs)
    params = [list(trainer.model.decoders[task].parameters()) for task in trainer.task_name]
    grads = [
        torch.autograd.grad(
            trainer.task_dict[task]["loss_fn"].compute_loss(preds[task], labels[task]), own, retain_graph=True
        )
        for task, own in zip(trainer.task_name, params, strict=True)
    ]
    fill_grads(trainer, batches)
    weights = trainer.model.last_weights
    assert weights.shape == (len(LAYERS), TASKS)
    assert not torch.allclose(weights[0], weights[1])
    for own, of_task, weight in zip(params, grads, weights.mean(0), strict=True):
        for param, grad in zip(own, of_task, strict=True):
            torch.testing.assert_close(param.grad, weight * grad)


def test_a_rule_of_one_matrix_is_asked_for_each_group() -> None:
    trainer = double_trainer(Counts)
    batches = batches_of(trainer)
    rows = rows_of(trainer, batches)
    trainer.step(batches, StepBuffer())
    squares = torch.tensor(
        [[float(row[k].square().sum() + row[k + 1].square().sum()) for row in rows] for k in (0, 2)]
    ).double()
    torch.testing.assert_close(trainer.model.seen, squares)
    torch.testing.assert_close(trainer.step.latest.group_weights, squares / squares.sum(1, keepdim=True))
    torch.testing.assert_close(trainer.step.latest.weights, (squares / squares.sum(1, keepdim=True)).mean(0))


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("all", None),
        ("module", ["encoder", "encoder.first", "encoder.layers.0.0", "encoder.layers.0.1"]),
        ("layer", ["encoder", "encoder.first", "encoder.layers.0.0", "encoder.layers.0.1"]),
        ({r"layers\.0": "low", r"layers": "high"}, ["other", "low", "high"]),
        ("first|token=front,.=back", ["front", "back"]),
    ],
)
def test_the_names_of_groups(wanted: Any, names: list[str] | None) -> None:
    trainer = make_trainer("MGDA", encoder_class=Blocks, groups=wanted)
    grouping = trainer.model.grouping
    if names is None:
        assert grouping is None
        return
    assert grouping.names[: len(names)] == names
    last = [name for name in grouping.names if name.startswith("encoder.last")]
    assert len(last) == {"module": 1, "layer": 6}.get(wanted if isinstance(wanted, str) else "", 0)


def test_residual_blocks_are_groups() -> None:
    from fastmtl.model import resnet18

    decoders = {f"task{t}": nn.Linear(512, 1 if t % 2 else 3) for t in range(2)}
    grouping = make_trainer("MGDA", encoder_class=resnet18, decoders=decoders, groups="module").model.grouping
    assert grouping is not None
    blocks = [f"encoder.layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert grouping.names[:10] == ["encoder.conv1", "encoder.bn1", *blocks]
    assert settled_groups("ALL") == "all"


@pytest.mark.parametrize(
    ("weighting", "options", "message"),
    [
        ("MGDA", {"groups": "blocks"}, "groups must be all, module, layer or regular expressions .* got 'blocks'"),
        ("MGDA", {"groups": {"(": "a"}}, "groups has '\\(', which is no regular expression"),
        ("MGDA", {"groups": {"a": 1}}, "groups must have a name for each regular expression"),
        ("MGDA", {"groups": {1: "a"}}, "groups must have a name for each regular expression"),
        ("MGDA", {"groups": {"decoder": "a"}}, "'decoder' comes first for none of the shared parameters"),
        ("MGDA", {"groups": 3}, "groups must be text"),
        ("MGDA", {"rep_grad": True}, "groups must be all for MGDA, which weighs gradients of the representation"),
        ("EW", {}, "groups must be all for EW, which needs no Gram matrix"),
        ("MoCo", {}, "groups must be all for MoCo, which needs no Gram matrix"),
        ("GradVac", {}, "groups must be all for GradVac, which cannot weigh them apart: it has groups of its own"),
        ("GradNorm", {}, "groups must be all for GradNorm, which cannot weigh them apart: it learns one weight"),
    ],
)
def test_what_groups_cannot_be(weighting: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_trainer(weighting, **({"groups": "layer"} | options))


class _Learns(AbsWeighting):
    needs = "gram"

    def init_param(self) -> None:
        self.loss_scale = nn.Parameter(torch.ones(self.task_num))

    def weigh(self, losses: Tensor, gram: Tensor, **hyper: Any) -> Weights:
        return Weights(shared=torch.ones_like(losses), own_grads={"loss_scale": torch.ones_like(losses)})


def test_a_rule_that_learns_parameters_of_its_own_is_refused() -> None:
    trainer = double_trainer(_Learns)
    batches = batches_of(trainer)
    with pytest.raises(UsageError, match=r"test_groups.py:\d+: .*gradients of its own parameters"):
        trainer.step(batches, StepBuffer())


class _Assigns(AbsWeighting):
    needs = "gram"
    looks_back = True
    previous: Tensor

    def init_param(self) -> None:
        self.remember("previous", torch.ones(self.task_num))

    def weigh(self, losses: Tensor, gram: Tensor, **hyper: Any) -> Weights:
        return Weights(shared=self.previous)

    def after_step(self, losses: Tensor, **hyper: Any) -> None:
        self.previous = losses


def test_what_is_remembered_for_the_whole_network_is_refused() -> None:
    trainer = double_trainer(_Assigns)
    trainer.step(batches_of(trainer), StepBuffer())
    batches = batches_of(trainer)
    with pytest.raises(UsageError, match="groups must be all for _Assigns, which has assigned previous for the whole"):
        trainer.step(batches, StepBuffer())


class _ByAutograd(AbsWeighting):
    """A rule that differentiates."""

    needs = "gram"

    def weigh(self, losses: Tensor, gram: Tensor, **hyper: Any) -> Weights:
        weights = torch.ones(self.task_num, dtype=gram.dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(weights @ gram @ weights, weights)
        return Weights(shared=(-0.1 * grad).softmax(0))


class _Normed(MGDA):
    """A rule of the package that a user has changed, for one Gram matrix."""

    def weigh(self, losses: Tensor, gram: Tensor, **hyper: Any) -> Weights:
        weights = super().weigh(losses, gram, **hyper)
        return replace(weights, shared=weights.shared / weights.shared.norm())


def test_a_changed_rule_is_asked_for_each_group() -> None:
    trainer = double_trainer(_Normed, groups="layer")
    trainer.step(batches_of(trainer), StepBuffer())
    weights = trainer.step.latest.group_weights
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(len(weights), dtype=weights.dtype))


@pytest.mark.parametrize("groups", ["all", "layer"])
def test_a_rule_may_differentiate(groups: str) -> None:
    trainer = double_trainer(_ByAutograd, groups=groups)
    trainer.step(batches_of(trainer), StepBuffer())
    assert trainer.latest.weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("frozen", ["first", "all"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Nash_MTL", {"groups": "module"}),
        ("MGDA", {"update_weights_every": 5, "groups": "layer"}),
        ("PCD", {"weight_momentum": 0.5}),
        ("CAGrad", {"vjps": "blockwise"}),
        ("UPGrad", {"groups": {"first": "a", ".": "b"}}),
    ],
    ids=str,
)
def test_groups_stay_when_layers_are_frozen(name: str, options: dict[str, Any], frozen: str, tmp_path: Path) -> None:
    """What is left keeps its state and its weights; the trainer is told by freezing a layer and thawing a decoder."""
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    trainer: Any = make_trainer(
        name, count=TASKS, encoder_class=Chain, logger=logger, log_every=100, **({"groups": "layer"} | options)
    )
    model = trainer.model
    model.decoders["task0"].requires_grad_(False)
    data = loaders(TASKS, rows=32)
    trainer.train(data, data, 1)
    names, before = model.grouping.names, flat(model.encoder.parameters())
    (model.encoder.first if frozen == "first" else model.encoder).requires_grad_(False)
    model.decoders["task0"].requires_grad_(True)
    trainer.train(data, data, 1)
    assert model.grouping.names == names
    weights = trainer.step.latest.group_weights
    assert weights.shape == (len(names), TASKS)
    count = sum(param.numel() for param in model.encoder.first.parameters())
    after = flat(model.encoder.parameters())
    assert torch.equal(after[:count], before[:count])
    assert torch.equal(after, before) == (frozen == "all")


def test_a_decoder_has_the_mean_over_the_groups_that_its_task_reaches() -> None:
    model: Any = double_trainer("FairGrad").model
    zero = torch.tensor([[0.01, 0.02, 0.0], [0.0, 0.03, 0.0], [0.0, 0.01, 0.0]], dtype=torch.float64)
    model.last_weights = torch.ones_like(zero)
    heads = model.settled(zero).heads
    torch.testing.assert_close(heads.nanmean(0)[:2], torch.tensor([0.01, 0.02], dtype=torch.float64))
    assert heads[:, 2].isnan().all()


@pytest.mark.parametrize("name", ["Nash_MTL", "PCD", "MoDo"])
def test_resumes_exactly(name: str, tmp_path: Path) -> None:
    def run(epochs: int, **more: Any) -> Tensor:
        trainer: Any = make_trainer(name, count=TASKS, groups="layer", **more)
        if "resume" not in more:
            torch.manual_seed(5)
        trainer.train(loaders(TASKS, rows=48), loaders(TASKS), epochs)
        return flat([*trainer.model.parameters(), *trainer.model.buffers()])

    run(1, save_path=str(tmp_path))
    assert torch.equal(run(2, resume=str(tmp_path / "last.pt")), run(2))


@pytest.mark.parametrize(
    "options",
    [
        {"vjps": "layerwise"},
        {"vjps": "batched"},
        {"accumulate": 2},
        {"update_weights_every": 2},
        {"weight_momentum": 0.5},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["MGDA", "Nash_MTL"])
def test_every_way_does_the_same(name: str, options: dict[str, Any]) -> None:
    """One way is the plain one: with the same option, or without it where it only says how."""
    how = {"vjps", "compile"} & set(options)
    ends = []
    for given in ({} if how else options | {"vjps": "sequential"}, options):
        trainer = double_trainer(name, clip_grad_norm=0.3, **given)
        data = [
            (x.double(), {task: y.double() if y.is_floating_point() else y for task, y in labels.items()})
            for x, labels in loaders(TASKS, rows=48)
        ]
        count = trainer.step.batches
        for first in range(0, len(data), count):
            trainer.step(data[first : first + count], StepBuffer())
        ends.append(flat(trainer.model.parameters()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-7, atol=1e-9)


def test_held_weights_keep_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = double_trainer("Nash_MTL", weight_args={"max_norm": 0.01}, update_weights_every=2)
    shared = [param for param in trainer.model.get_share_params() if param.requires_grad]
    for _ in range(2):
        trainer.step(batches_of(trainer), StepBuffer())
        norm = torch.cat([param.grad.flatten() for param in shared]).norm()
        assert 0.009 < float(norm) <= 0.01 + 1e-9


@pytest.mark.parametrize("name", ["Nash_MTL", "CAGrad", "PCD"])
def test_steps_of_some_tasks(name: str) -> None:
    trainer = double_trainer(name)
    before = {key: getattr(trainer.model, key).clone() for key in trainer.model.remembered()}
    ((inputs, labels),) = batches_of(trainer)
    buffer = StepBuffer()
    trainer.step([(inputs, {task: labels[task] for task in ("task0", "task2")})], buffer, present=[0, 2])
    latest = trainer.step.latest
    assert latest.group_weights.shape == (len(LAYERS), TASKS)
    assert latest.group_weights[:, 1].isnan().all()
    assert latest.group_grams[:, [0, 2]][..., [0, 2]].isfinite().all()
    for key, value in before.items():
        assert torch.equal(getattr(trainer.model, key)[:, 1], value[:, 1])
        assert not torch.equal(getattr(trainer.model, key)[:, 0], value[:, 0])


@pytest.mark.parametrize("vjps", ["sequential", "blockwise"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision(precision: str, vjps: str) -> None:
    """The loss scale of float16 does not show in the Gram matrices of groups."""
    grams = []
    for given in (precision, "fp32"):
        trainer: Any = make_trainer("Nash_MTL", count=TASKS, groups="layer", precision=given, vjps=vjps)
        # Steps of float16 whose gradients overflow change nothing.
        for _ in range(12):
            trainer.step([next(iter(loaders(TASKS)))], StepBuffer())
            if trainer.step.latest.group_grams.isfinite().all():
                break
        grams.append(trainer.step.latest.group_grams)
    torch.testing.assert_close(grams[0], grams[1], rtol=0.1, atol=0.1)


def test_groups_are_logged_and_drawn(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    loggers = [JsonlLogger(file), PlotLogger(tmp_path / "curves.png", file), TensorBoardLogger(tmp_path / "tb")]
    trainer: Any = make_trainer("CAGrad", count=TASKS, groups="layer", logger=loggers, save_path=str(tmp_path))
    trainer.train(loaders(TASKS), loaders(TASKS), 2)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "steps"]
    assert all(set(line["groups"]) == set(LAYERS) for line in steps)
    for line in steps:
        weights = [[line["groups"][group]["weight"][task] for group in LAYERS] for task in trainer.task_name]
        np.testing.assert_allclose(np.mean(weights, axis=1), list(line["weight"].values()), rtol=1e-5)
        # Squared norms of groups add up.
        assert set(line["groups"][LAYERS[0]]) == {"weight", "norm", "cosine", "conflict"}
    drawn = loggers[1].history
    assert drawn is not None
    assert drawn.groups.values.shape == (6, len(LAYERS))
    again: Any = PlotLogger(tmp_path / "again.png", file)
    make_trainer("CAGrad", count=TASKS, groups="layer", logger=again, resume=str(tmp_path / "last.pt")).train(
        loaders(TASKS), loaders(TASKS), 3
    )
    assert len(again.history.groups.steps) == 5
    assert (tmp_path / "again.png").stat().st_size > 10_000
