"""Losses with parameters, trained as the decoders are and a part of the model; modules and functions as losses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.errors import CheckpointError, UsageError
from fastmtl.loss import AbsLoss, CELoss, MSELoss
from fastmtl.metrics import AccMetric
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting import WEIGHTINGS
from tests.trainer.toy import fill_grads, loaders, make_trainer, task_dict


class Uncertain(MSELoss):
    """A loss with a parameter as an attribute: ``exp(-s) mse + s``."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(0.3))

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return torch.exp(-self.log_variance) * super().compute_loss(pred, gt) + self.log_variance


class Margin(AbsLoss, nn.Module):
    """A loss that is a module, with a parameter and a buffer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        AbsLoss.__init__(self)
        self.scale = nn.Linear(3, 3)
        self.register_buffer("shift", torch.tensor([0.1, 0.0, -0.1]))

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return F.cross_entropy(self.scale(pred) + self.shift, gt)


class Plain(nn.Module):
    """A module of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, pred: Tensor, gt: Tensor) -> Tensor:
        return (self.scale * (pred - gt) ** 2).mean()


def learned(count: int = 2, **losses: Any) -> dict[str, dict[str, Any]]:
    tasks = task_dict(count)
    for task, loss in ({"task0": Margin(), "task1": Uncertain()} | losses).items():
        tasks[task]["loss_fn"] = loss
    return tasks


def loss_grads(trainer: Any) -> dict[str, Tensor]:
    grads = {name: param.grad for name, param in trainer.model.loss_fn.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return grads


def reference(trainer: Any, batch: tuple[Any, Mapping[str, Tensor]], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The gradients of the losses' parameters by plain autograd in float64, each task's times its weight."""
    model = copy.deepcopy(trainer.model).double()
    inputs, labels = batch
    losses = {task: copy.deepcopy(trainer.meter.losses[task]) for task in labels}
    held = dict(model.loss_fn.named_children())
    multi = isinstance(inputs, Mapping)
    found: dict[str, Tensor] = {}
    for task in labels:
        pred = model(inputs[task].double(), task)[task] if multi else model(inputs.double())[task]
        gt = labels[task].double() if labels[task].is_floating_point() else labels[task]
        if task == "task0":
            loss = F.cross_entropy(held[task].scale(pred) + held[task].shift, gt)
        else:
            s = held[task].log_variance
            loss = torch.exp(-s) * ((pred - gt) ** 2).mean() + s
        params = dict(held[task].named_parameters())
        grads = torch.autograd.grad(loss, list(params.values()))
        found |= {f"{task}.{name}": weights[task] * grad for name, grad in zip(params, grads, strict=True)}
    del losses
    return found


def check(trainer: Any, batch: Any, weights: Mapping[str, float] | None = None) -> None:
    expected = reference(trainer, batch, weights or dict.fromkeys(batch[1], 1.0))
    for name, grad in loss_grads(trainer).items():
        torch.testing.assert_close(grad.double(), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "PCGrad", "DB_MTL", "Aligned_MTL", "GradVac", "UPGrad"])
def test_they_get_the_gradient_of_their_own_loss(weighting: str) -> None:
    trainer = make_trainer(weighting, task_dict=learned())
    batch = next(iter(loaders()))
    if weighting == "DB_MTL":
        # It takes the logarithm of the losses.
        trainer.kwargs["weight_args"] = {"DB_beta": 0.9, "DB_beta_sigma": 0.0}
        fill_grads(trainer, [batch])
        assert loss_grads(trainer)
        return
    fill_grads(trainer, [batch])
    check(trainer, batch)


@pytest.mark.parametrize("weighting", ["Nash_MTL", "FairGrad", "IMTL", "CAGrad"])
@pytest.mark.parametrize("multi_input", [False, True])
def test_they_are_weighted_as_the_decoders_are(weighting: str, multi_input: bool) -> None:
    trainer = make_trainer(weighting, task_dict=learned(), multi_input=multi_input)
    data = loaders(multi_input=multi_input)
    if multi_input:
        parts = {task: next(iter(loader)) for task, loader in data.items()}
        batch: Any = ({task: x for task, (x, _) in parts.items()}, {task: y for task, (_, y) in parts.items()})
    else:
        batch = next(iter(data))
    fill_grads(trainer, [batch])
    plain = make_trainer("EW", task_dict=learned(), multi_input=multi_input)
    plain.model.load_state_dict(trainer.model.state_dict(), strict=False)
    fill_grads(plain, [batch])
    weights = {}
    for task in trainer.task_name:
        of_decoder, unweighted = (each.model.decoders[task].weight.grad for each in (trainer, plain))
        assert of_decoder is not None
        assert unweighted is not None
        weights[task] = float((of_decoder.double() * unweighted).sum() / (unweighted.double() ** 2).sum())
    check(trainer, batch, weights)


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "Aligned_MTL"])
def test_with_representations_of_the_encoder(weighting: str) -> None:
    trainer = make_trainer(weighting, task_dict=learned(), rep_grad=True)
    batch = next(iter(loaders()))
    fill_grads(trainer, [batch])
    trainer.model.rep_grad = False
    check(trainer, batch)


@pytest.mark.parametrize("weighting", ["EW", "MGDA"])
def test_accumulated_batches_are_one(weighting: str) -> None:
    trainer = make_trainer(weighting, task_dict=learned(), accumulate=3)
    batches = list(loaders())
    fill_grads(trainer, batches)
    joined = (
        torch.cat([x for x, _ in batches]),
        {task: torch.cat([y[task] for _, y in batches]) for task in trainer.task_name},
    )
    check(trainer, joined)


@pytest.mark.parametrize("weighting", ["AutoLambda", "MOML", "FORUM"])
def test_bilevel_strategies_train_them(weighting: str) -> None:
    trainer = make_trainer(weighting, task_dict=learned())
    trainer.model.epoch = 0
    before = [param.clone() for param in trainer.model.loss_fn.parameters()]
    data = next(iter(loaders()))
    trainer.step([data] * trainer.step.batches, StepBuffer())
    assert all(not torch.equal(old, new) for old, new in zip(before, trainer.model.loss_fn.parameters(), strict=True))
    if weighting == "AutoLambda":
        trainer.step.optimizer.optimizer.zero_grad()
        fill_grads(trainer, [data, data])
        check(trainer, data, dict(zip(trainer.task_name, trainer.model.task_weights().tolist(), strict=True)))


def test_they_are_a_part_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make_trainer("MGDA")
    losses = learned()
    trainer = make_trainer("MGDA", task_dict=losses, save_path=str(tmp_path))
    counted = capsys.readouterr().out
    extra = 12 + 1
    total = sum(param.numel() for param in plain.model.parameters())
    assert f"Total Params: {total + extra}\n" in counted
    names = set(trainer.model.state_dict()) - set(plain.model.state_dict())
    assert names == {f"loss_fn.task0.{name}" for name in ("scale.weight", "scale.bias", "shift")} | {
        "loss_fn.task1.log_variance"
    }
    shared = {id(param) for param in trainer.step.problem.shared_params}
    assert shared == {id(param) for param in trainer.model.encoder.parameters()}
    trainer.model.eval()
    assert not losses["task0"]["loss_fn"].scale.training
    trainer.train(loaders(), loaders(), 2)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert names < set(best)
    again = make_trainer("MGDA", task_dict=learned(), load_path=str(tmp_path))
    assert torch.equal(again.model.loss_fn["task1"].log_variance, best["loss_fn.task1.log_variance"])
    assert again.meter.losses["task1"].log_variance is again.model.loss_fn["task1"].log_variance


def test_resumed_they_go_on_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim_param": {"optim": "adam", "lr": 1e-2}}
    whole = make_trainer("MGDA", task_dict=learned(), **options)
    state = copy.deepcopy(whole.model.state_dict())
    whole.train(loaders(), loaders(), 3)
    first = make_trainer("MGDA", task_dict=learned(), save_path=str(tmp_path), **options)
    first.model.load_state_dict(state)
    first.train(loaders(), loaders(), 1)
    second = make_trainer("MGDA", task_dict=learned(), resume=str(tmp_path), **options)
    second.train(loaders(), loaders(), 3)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_checkpoints_without_them_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer("MGDA", save_path=str(tmp_path)).train(loaders(), loaders(), 1)
    trainer = make_trainer("MGDA", task_dict=learned(), load_path=str(tmp_path))
    assert "begin anew: loss_fn.task0.shift, loss_fn.task0.scale.weight, " in capsys.readouterr().out
    assert trainer.model.loss_fn["task1"].log_variance.item() == pytest.approx(0.3)
    with pytest.raises(
        CheckpointError, match=r"is of other losses: loss_fn\.task0\.scale\.bias, .* is not in the checkpoint"
    ):
        make_trainer("MGDA", task_dict=learned(), resume=str(tmp_path))


def test_an_attribute_of_the_network_keeps_its_name() -> None:
    from fastmtl.architecture import HPS

    class Named(HPS):
        loss_fn = "mine"

    trainer = make_trainer("MGDA", Named, task_dict=learned())
    assert trainer.model.loss_fn == "mine"
    assert "loss_fn_.task1.log_variance" in trainer.model.state_dict()


def test_share_params_of_everything_but_the_decoders_leave_them_out() -> None:
    from fastmtl.architecture import HPS

    class Broad(HPS):
        def get_share_params(self) -> Any:
            return [param for name, param in self.named_parameters() if not name.startswith("decoders")]

    trainer = make_trainer("GradVac", Broad, task_dict=learned(), weight_args={"GradVac_group_type": 1})
    assert len(trainer.step.problem.shared_params) == 4
    fill_grads(trainer, [batch := next(iter(loaders()))])
    check(trainer, batch)


class Shared(CELoss):
    def __init__(self) -> None:
        super().__init__()
        self.nets = [nn.Linear(3, 3)]

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return super().compute_loss(self.nets[0](pred), gt)


class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return F.cross_entropy(self.inner(pred), gt)


@pytest.mark.parametrize("weighting", ["EW", "MGDA", "FairGrad"])
@pytest.mark.parametrize("kind", [Shared, SharedModule])
def test_one_of_several_tasks_is_trained_by_all_of_them(kind: Any, weighting: str) -> None:
    loss = kind()
    tasks = {
        task: {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": loss, "weight": [1]}
        for task in ("task0", "task1")
    }
    torch.manual_seed(0)
    decoders = nn.ModuleDict({task: nn.Linear(8, 3) for task in tasks})
    trainer = make_trainer(weighting, task_dict=tasks, decoders=decoders)
    data = [(x, {"task0": labels["task0"], "task1": labels["task2"]}) for x, labels in loaders(3)]
    fill_grads(trainer, data[:1])
    (linear,) = [module for module in trainer.model.loss_fn.modules() if isinstance(module, nn.Linear)]
    assert len(list(trainer.model.loss_fn.parameters())) == 2
    weights = trainer.step._gradients(
        trainer.step._context(data[:1], trainer.step._tasks(None)), trainer.step.weights
    ).weights
    assert weights is not None
    found = linear.weight.grad
    shown = torch.ones(2) if not trainer.step.strategy.weighs_heads else None
    preds = trainer.model(data[0][0])
    losses = [F.cross_entropy(linear(preds[task]), data[0][1][task]) for task in tasks]
    grads = [torch.autograd.grad(each, linear.weight, retain_graph=True)[0] for each in losses]
    assert found is not None
    if shown is not None:
        # The second pass adds nothing: it writes what the first one wrote.
        ratio = (found / sum(grads)).flatten()
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-3)
    trainer.train(data, data, 1)
    assert trainer.meter.loss_item[0] != trainer.meter.loss_item[1]


class Composite(AbsLoss):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"a": Uncertain(), "b": [Plain()]}
        self.again = self

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        of_a: Any = self.parts["a"]
        of_b: Any = self.parts["b"]
        return of_a.compute_loss(pred, gt) + of_b[0](pred, gt)


def test_names_that_would_fall_together_stay_apart() -> None:
    class Named(MSELoss):
        def __init__(self) -> None:
            super().__init__()
            self.nets: Any = [nn.Linear(1, 1), {"a.b": nn.Linear(1, 1), "a_b": nn.Linear(1, 1)}]
            self.nets_0 = nn.Linear(1, 1)
            self.training = nn.Parameter(torch.ones(()))

    trainer = make_trainer("EW", task_dict=learned(task1=Named()))
    names = {name for name, _ in trainer.model.loss_fn["task1"].named_parameters()}
    assert names == {
        f"{layer}.{name}" for layer in ("nets_0", "nets_1_a_b", "nets_1_a_b_", "nets_0_") for name in ("weight", "bias")
    } | {"training_"}


def test_parameters_in_containers_and_further_losses_are_found() -> None:
    trainer = make_trainer("MGDA", task_dict=learned(task1=Composite()))
    names = [name for name, _ in trainer.model.loss_fn["task1"].named_parameters()]
    assert names == ["parts_a_log_variance", "parts_b_0.scale"]


def test_a_network_that_was_fixed_stays_in_evaluation_mode() -> None:
    class Perceptual(MSELoss):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)
            self.head = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

        def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
            return super().compute_loss(self.head(self.net(pred)), self.head(self.net(gt)))

    loss = Perceptual()
    trainer = make_trainer("EW", task_dict=learned(task1=loss))
    means = loss.net[1].running_mean.clone()
    trainer.train(loaders(), loaders(), 1)
    trainer.model.train()
    assert [module.training for module in (*loss.net, *loss.head)] == [False, False, True, True]
    assert torch.equal(loss.net[1].running_mean, means)


@pytest.mark.parametrize(
    "given",
    [
        nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(delta=0.5),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(1) * 2),
        F.mse_loss, partial(F.huber_loss, delta=0.5), lambda pred, gt: ((pred - gt) ** 2).mean(), Plain(),
        nn.MSELoss(reduction="sum"),
    ],
    ids=lambda given: getattr(given, "__name__", type(given).__name__),
)  # fmt: skip
def test_missing_labels_are_left_out_of_modules_and_functions(given: Any) -> None:
    tasks = task_dict()
    tasks["task1"]["loss_fn"] = given
    trainer = make_trainer("MGDA", task_dict=tasks)
    loss = trainer.meter.losses["task1"]
    pred, gt = torch.randn(6, 1, requires_grad=True), torch.rand(6, 1)
    expected = given(pred[[0, 2, 5]], gt[[0, 2, 5]])
    gt[[1, 3, 4]] = torch.nan
    torch.testing.assert_close(loss.compute_loss(pred, gt), expected)
    nothing = loss.compute_loss(pred, gt * torch.nan)
    assert nothing.item() == 0
    (grad,) = torch.autograd.grad(nothing, pred)
    assert not grad.any()


def test_entries_may_be_missing_where_the_loss_is_known() -> None:
    tasks = task_dict()
    tasks["task1"]["loss_fn"] = nn.L1Loss()
    known = make_trainer("EW", task_dict=tasks).meter.losses["task1"]
    pred, gt = torch.randn(4, 3), torch.randn(4, 3)
    gt[0, 1] = gt[2, 0] = torch.nan
    there = ~gt.isnan()
    torch.testing.assert_close(known.compute_loss(pred, gt), (pred - gt)[there].abs().mean())
    tasks["task1"]["loss_fn"] = lambda pred, gt: (pred - gt).abs().mean()
    unknown = make_trainer("EW", task_dict=tasks).meter.losses["task1"]
    with pytest.raises(
        UsageError, match=r"task_dict\['task1'\]\['loss_fn'\] is a function, which cannot be told of rows"
    ):
        unknown.compute_loss(pred, gt)


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.5, 2.0])])
@pytest.mark.parametrize("as_function", [False, True])
def test_cross_entropy_of_torch(ignore_index: int, weight: Tensor | None, as_function: bool) -> None:
    options: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": 0.1}
    given: Any = partial(F.cross_entropy, **options) if as_function else nn.CrossEntropyLoss(**options)
    tasks = task_dict()
    tasks["task0"]["loss_fn"] = given
    trainer = make_trainer("EW", task_dict=tasks)
    loss = trainer.meter.losses["task0"]
    assert ("loss_fn.task0.weight" in trainer.model.state_dict()) == (weight is not None and not as_function)
    pred, gt = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 1, 0, ignore_index, ignore_index])
    torch.testing.assert_close(loss.compute_loss(pred, gt), given(pred, gt))
    assert loss.compute_loss(pred, gt[4:].repeat(3)).item() == 0
    assert int(loss.labelled(gt).sum()) == 4
    if ignore_index != -100:
        # Torch takes no other with probabilities.
        return
    soft = torch.softmax(torch.randn(6, 3), 1)
    expected = given(pred[:4], soft[:4])
    soft[4:] = torch.nan
    torch.testing.assert_close(loss.compute_loss(pred, soft), expected)


def test_weighted_means_of_accumulated_batches_are_those_of_one() -> None:
    def trainer(accumulate: int) -> Any:
        tasks = task_dict()
        tasks["task0"]["loss_fn"] = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.2, 3.0]))
        return make_trainer("EW", task_dict=tasks, accumulate=accumulate)

    batches = list(loaders(batch=7, rows=21))
    joined = (
        torch.cat([x for x, _ in batches]),
        {task: torch.cat([y[task] for _, y in batches]) for task in ("task0", "task1")},
    )
    several, one = trainer(3), trainer(1)
    fill_grads(several, batches)
    fill_grads(one, [joined])
    for mine, other in zip(several.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_what_nobody_would_train_is_refused() -> None:
    critic = nn.Linear(1, 1)

    def refused(loss: Any, message: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=message):
            make_trainer("EW", task_dict=learned(task1=loss), **options)

    refused(lambda pred, gt: (critic(pred) - gt).square().mean(), "is a function that uses 'critic'")
    refused(partial(lambda pred, gt, net: net(pred - gt).mean(), net=critic), "is a function that uses 'net'")
    loss = MSELoss()
    loss.scale = torch.ones((), requires_grad=True)
    refused(loss, "has a tensor 'scale' that requires gradients and is no nn.Parameter")
    refused(nn.MSELoss(reduction="sum"), "is a sum over the batch", accumulate=2)
    refused(nn.MSELoss, "must be an object of a class derived from fastmtl.loss.AbsLoss")
    refused("mse", "must be an object of a class derived from fastmtl.loss.AbsLoss")
    refused(nn.GaussianNLLLoss(), "cannot be called with predictions and labels: missing a required argument: 'var'")
    refused(nn.Sequential(nn.Linear(1, 1)), "cannot be called with predictions and labels: too many positional arg")
    lazy = MSELoss()
    lazy.layer = nn.LazyLinear(1)
    refused(lazy, "has lazy layers")
    critic.requires_grad_(False)
    make_trainer("EW", task_dict=learned(task1=lambda pred, gt: (critic(pred) - gt).square().mean()))


@pytest.mark.parametrize("vjps", ["batched", "layerwise"])
@pytest.mark.parametrize("weighting", ["MGDA", "FairGrad"])
def test_whatever_way_the_gradients_of_many_tasks_go(weighting: str, vjps: str) -> None:
    def grads(way: str) -> dict[str, Tensor]:
        tasks = task_dict(9)
        for index, task in enumerate(tasks):
            tasks[task]["loss_fn"] = Uncertain() if index % 2 else Margin()
        trainer = make_trainer(weighting, count=9, task_dict=tasks, vjps=way)
        trainer.model.loss_fn.load_state_dict(state)
        fill_grads(trainer, [next(iter(loaders(9)))])
        return loss_grads(trainer)

    tasks = task_dict(9)
    for index, task in enumerate(tasks):
        tasks[task]["loss_fn"] = Uncertain() if index % 2 else Margin()
    state = make_trainer(weighting, count=9, task_dict=tasks).model.loss_fn.state_dict()
    plain = grads("sequential")
    for name, grad in grads(vjps).items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", sorted(set(WEIGHTINGS) - {"GradDrop", "DB_MTL", "GLS", "PCD"}))
def test_every_strategy_trains_them(weighting: str) -> None:
    trainer = make_trainer(weighting, task_dict=learned())
    before = {name: param.clone() for name, param in trainer.model.loss_fn.named_parameters()}
    trainer.train(loaders(rows=16), loaders(rows=8), 1)
    assert all(not torch.equal(param, before[name]) for name, param in trainer.model.loss_fn.named_parameters())
