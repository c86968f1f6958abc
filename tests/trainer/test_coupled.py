"""Losses that depend on the predictions of several tasks: each has its whole gradient."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastmtl import Trainer
from fastmtl.architecture import HPS
from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss, MSELoss
from fastmtl.metrics import L1Metric
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting import WEIGHTINGS
from tests.trainer.toy import encoder, make_trainer

TASKS = ("ctr", "ctcvr")
Batch = tuple[Tensor, dict[str, Tensor]]
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class _Product(Trainer):
    """The second task's prediction is the product of both."""

    def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
        first, second = (preds[task].sigmoid() for task in TASKS)
        return {"ctr": first, "ctcvr": first * second}


class _Keeping(nn.Module):
    """Keeps its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, features: Tensor) -> Tensor:
        self.last: Tensor = self.layer(features).sigmoid()
        return self.last


class _OfOther(nn.Module):
    """Multiplies by what another decoder, which this one does not own, has returned."""

    def __init__(self, other: _Keeping) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)
        self.others = [other]

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.layer(features).sigmoid() * self.others[0].last
        return result


class _Calling(nn.Module):
    """Runs another decoder on its own features."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(8, 1), other

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.layer(features).sigmoid() * self.other(features)
        return result


class _WithOther(AbsLoss):
    """Multiplies the prediction by that of another decoder."""

    def __init__(self, other: _Keeping) -> None:
        super().__init__()
        self.other = other

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return (pred.sigmoid() * self.other.last - gt).square().mean()


class _OnePiece(HPS):
    """An architecture with a forward of its own."""

    def forward(self, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        features = self.encoder(inputs)
        first, second = (
            self.decoders[task](self._prepare_rep(features, task, same_rep=True)).sigmoid() for task in TASKS
        )
        return {"ctr": first, "ctcvr": first * second}


def _trainer(weighting: str, kind: str, **options: Any) -> Trainer:
    torch.manual_seed(0)
    first = _Keeping() if kind in ("kept", "loss", "called") else nn.Linear(8, 1)
    second = {"kept": _OfOther, "called": _Calling}.get(kind, lambda other: nn.Linear(8, 1))(first)
    losses = [MSELoss(), _WithOther(first) if kind == "loss" else MSELoss()]
    tasks = {
        task: {"metrics": ["L1"], "metrics_fn": L1Metric(), "loss_fn": loss, "weight": [0]}
        for task, loss in zip(TASKS, losses, strict=True)
    }
    given = {
        "task_dict": tasks,
        "encoder_class": encoder,
        "decoders": nn.ModuleDict({"ctr": first, "ctcvr": second}),
        "trainer_class": _Product if kind == "product" else Trainer,
        "optim_param": {"optim": "sgd", "lr": 0.5},
    }
    if kind == "one piece":
        given["architecture"] = _OnePiece
    return make_trainer(weighting, **(given | options))


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 6, generator=generator)
    return x, {task: torch.rand(8, 1, generator=generator) for task in TASKS}


KINDS = ["product", "kept", "called", "loss", "one piece"]
# What a step does beyond gradients of the losses is tested elsewhere.
BALANCING = sorted(name for name, rule in WEIGHTINGS.items() if rule.needs == "gram" and rule.samples == 1)


def _rows(trainer: Any, batch: Batch) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return the gradients of each loss by plain autograd: of the shared parameters, and of the others."""
    problem = trainer.step.problem
    count = len(problem.shared_params)
    rows = []
    for t in range(len(batch[1])):
        losses, _ = problem.whole(*batch)
        params = [*problem.shared_params, *problem.own_params]
        rows.append(torch.autograd.grad(losses[t], params, allow_unused=True, materialize_grads=True))
    return [list(row[:count]) for row in rows], [list(row[count:]) for row in rows]


def _flat(row: list[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in row])


def _weights(moved: Tensor, rows: list[list[Tensor]]) -> Tensor:
    """Return the weights of rows in a sum, and check that it is one."""
    matrix = torch.stack([_flat(row) for row in rows]).T
    weights = torch.linalg.lstsq(matrix, moved[:, None]).solution
    torch.testing.assert_close((matrix @ weights)[:, 0], moved, rtol=1e-9, atol=1e-11)
    return weights[:, 0]


def _step_weights(trainer: Any, batch: Batch, plain: Any = None) -> tuple[Tensor, Tensor]:
    """Run a step; return the weights of each loss's gradient by plain autograd in its update: shared, and others."""
    trainer.model.epoch, trainer.model.epochs = 0, 1
    rows = _rows(plain or trainer, batch)
    problem = trainer.step.problem
    groups = problem.shared_params, problem.own_params
    before = [[param.detach().clone() for param in params] for params in groups]
    trainer.step([batch], StepBuffer())
    moved = [
        _flat([(old - param.detach()) / 0.5 for old, param in zip(olds, params, strict=True)])
        for olds, params in zip(before, groups, strict=True)
    ]
    return _weights(moved[0], rows[0]), _weights(moved[1], rows[1])


@pytest.mark.parametrize("kind", KINDS)
def test_mgda_goes_by_the_whole_gradients(kind: str) -> None:
    trainer = _trainer("MGDA", kind)
    a, b = (_flat(row) for row in _rows(trainer, _batch())[0])
    shared, heads = _step_weights(trainer, _batch())
    first = (((b - a) @ b) / ((b - a) @ (b - a))).clamp(0, 1)
    torch.testing.assert_close(shared, torch.stack([first, 1 - first]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heads, torch.ones(2))


@pytest.mark.parametrize("name", BALANCING)
def test_all_strategies_see_the_whole_gradients(name: str) -> None:
    for cut, whole in zip(
        _step_weights(_trainer(name, "product"), _batch()),
        _step_weights(_trainer(name, "one piece"), _batch()),
        strict=True,
    ):
        torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("architecture", ["MMoE", "CGC", "Cross_stitch"])
@pytest.mark.parametrize("vjps", ["sequential", "batched", "compressed"])
def test_architectures_and_ways(architecture: str, vjps: str) -> None:
    args = {"MMoE": {"img_size": [6], "num_experts": [2]}, "CGC": {"img_size": [6], "num_experts": [1, 1, 1]}}
    trainer = _trainer("MGDA", "product", architecture=architecture, vjps=vjps, arch_args=args.get(architecture, {}))
    _, heads = _step_weights(trainer, _batch())
    torch.testing.assert_close(heads, torch.ones(2))


@pytest.mark.parametrize("name", ["MoCo", "DB_MTL", "ExcessMTL", "MoDo", "FORUM", "GradNorm"])
def test_a_network_that_is_cut_learns_what_one_in_one_piece_does(name: str) -> None:
    found = []
    for kind in ("kept", "one piece"):
        trainer: Any = _trainer(name, kind)
        assert trainer.model.splits is (kind == "kept")
        trainer.model.epoch, trainer.model.epochs = 0, 1
        for _ in range(3):
            trainer.step([_batch()] * trainer.step.batches, StepBuffer())
        found.append(_flat(list(trainer.model.parameters())))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["product", "kept", "loss", "one piece"])
def test_representations_that_tasks_share(kind: str) -> None:
    trainer = _trainer("MGDA", kind, rep_grad=True)
    shared, heads = _step_weights(trainer, _batch(), _trainer("MGDA", kind))
    torch.testing.assert_close(shared, trainer.latest.weights.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(heads, torch.ones(2))


def test_representations_of_tasks_of_their_own_are_refused() -> None:
    trainer: Any = _trainer(
        "MGDA", "product", rep_grad=True, architecture="MMoE", arch_args={"img_size": [6], "num_experts": [2]}
    )
    trainer.model.epoch = 0
    before = _flat(list(trainer.model.parameters())).clone()
    with pytest.raises(UsageError, match=r"rep_grad must be False for MMoE here: some loss depends on"):
        trainer.step([_batch()], StepBuffer())
    assert torch.equal(before, _flat(list(trainer.model.parameters())))


@pytest.mark.parametrize("kind", ["product", "kept", "loss"])
@pytest.mark.parametrize("name", ["MGDA", "EW", "FORUM"])
@pytest.mark.parametrize("frozen", [False, True])
def test_tasks_without_labels_are_decoded_all_the_same(name: str, kind: str, frozen: bool) -> None:
    trainer: Any = _trainer(name, kind)
    if frozen:
        trainer.model.encoder.requires_grad_(False)
        trainer.step = trainer.make_step(trainer.step.options)
    trainer.model.epoch, trainer.model.epochs = 0, 1
    x, labels = _batch()
    if not frozen:
        trainer.step([(x, labels)] * trainer.step.batches, StepBuffer())
    for _ in range(2):
        params = [*trainer.step.problem.shared_params, *trainer.step.problem.own_params]
        before = [param.detach().clone() for param in params]
        loss = trainer.step.problem.whole(x, labels)[0][1]
        want = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        losses, _ = trainer.step([(x, {"ctcvr": labels["ctcvr"]})] * trainer.step.batches, StepBuffer(), [1])
        assert list(losses) == ["ctcvr"]
        for param, old, grad in zip(params, before, want, strict=True):
            if name == "FORUM":
                assert (old != param).any()
            else:
                torch.testing.assert_close(old - param.detach(), 0.5 * grad, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", ["product", "kept", "loss"])
def test_labels_in_one_of_the_accumulated_batches(kind: str) -> None:
    x, labels = _batch()
    parts: list[Any] = [(x, {task: labels[task]}) for task in TASKS]
    found = []
    for batches in (parts, parts[::-1], [(x, labels)]):
        trainer: Any = _trainer("MGDA", kind, accumulate=len(batches))
        trainer.model.epoch = 0
        for _ in range(2):
            trainer.step(batches, StepBuffer())
        found.append(_flat(list(trainer.model.parameters())))
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1], found[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["product", "kept", "loss"])
@pytest.mark.parametrize("name", ["MGDA", "EW", "FAMO", "FORUM", "GradDrop"])
@pytest.mark.parametrize("seed", [0, 1], ids=["ctcvr first", "ctr first"])
def test_drawn_tasks_train(name: str, kind: str, seed: int) -> None:
    x, labels = _batch()
    random.seed(seed)
    rows: list[Any] = [(x[i], {task: labels[task][i] for task in TASKS}) for i in range(8)]
    options: dict[str, Any] = {"rep_grad": True} if name == "GradDrop" else {}
    trainer = _trainer(name, kind, tasks_per_step=1, **options)
    before = _flat(list(trainer.model.parameters())).clone()
    trainer.train(DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4), 2)
    assert (_flat(list(trainer.model.parameters())) != before).any()


def test_a_loss_that_joins_later() -> None:
    """From the second epoch on the second task's loss reads the first one's prediction."""

    class Later(Trainer):
        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            first, second = (preds[task].sigmoid() for task in TASKS)
            return {"ctr": first, "ctcvr": first * second if self.model.epoch else second}

    trainer: Any = _trainer("MGDA", "none", trainer_class=Later)
    trainer.model.epoch, trainer.model.epochs = 0, 2
    trainer.step([_batch()], StepBuffer())
    trainer.model.epoch = 1
    a, b = (_flat(row) for row in _rows(trainer, _batch())[0])
    before = _flat(trainer.step.problem.shared_params).clone()
    trainer.step([_batch()], StepBuffer())
    first = (((b - a) @ b) / ((b - a) @ (b - a))).clamp(0, 1)
    moved = (before - _flat(trainer.step.problem.shared_params)) / 0.5
    torch.testing.assert_close(moved, first * a + (1 - first) * b, rtol=1e-5, atol=1e-8)


def test_a_hook_that_leaves_out_a_task_is_told() -> None:
    class Leaves(Trainer):
        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            return {"ctr": preds["ctr"]}

    trainer: Any = _trainer("MGDA", "none", trainer_class=Leaves)
    trainer.model.epoch = 0
    with pytest.raises(UsageError, match="process_preds must return a dictionary with a prediction of every task"):
        trainer.step([_batch()], StepBuffer())


def test_tasks_with_inputs_of_their_own() -> None:
    """The second task's loss reads what the first one's decoder has made of its own inputs."""
    trainer: Any = _trainer("MGDA", "loss", multi_input=True)
    trainer.model.epoch = 0
    x, labels = _batch()
    problem = trainer.step.problem
    params = [*problem.shared_params, *problem.own_params]
    inputs = {"ctr": x, "ctcvr": x.flip(0)}
    rows = []
    for place in range(2):
        losses = [problem.single(inputs[task], labels[task], task)[0] for task in TASKS]
        rows.append(torch.autograd.grad(losses[place], params, allow_unused=True, materialize_grads=True))
    before = [param.detach().clone() for param in params]
    trainer.step([(inputs, labels)], StepBuffer())
    weights = trainer.step.latest.weights.double()
    for k, param in enumerate(params):
        shared = k < len(problem.shared_params)
        want = sum((weights[t] if shared else 1.0) * rows[t][k] for t in range(2))
        torch.testing.assert_close(before[k] - param, 0.5 * want, rtol=1e-6, atol=1e-10)


class _Keeps(nn.Module):
    """Keeps its input, whose derivatives a loss wants."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.detach().requires_grad_()
        self.features: Tensor = self.layers(self.x)
        return self.features


class _Slope(AbsLoss):
    """The residual of a differential equation: the derivative of the prediction with respect to the input."""

    def __init__(self, encoder: _Keeps) -> None:
        super().__init__()
        self.encoder = encoder

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(pred.sum(), self.encoder.x, create_graph=True)
        return (slope[:, :1] - gt).square().mean()


class _Penalty(AbsLoss):
    """Reads the shared features themselves."""

    def __init__(self, encoder: _Keeps) -> None:
        super().__init__()
        self.encoder = encoder

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return (pred - gt).square().mean() + self.encoder.features.square().mean()


@pytest.mark.parametrize("loss", [_Slope, _Penalty])
@pytest.mark.parametrize("name", ["MGDA", "EW", "MoDo", "FORUM"])
def test_losses_that_read_more_than_predictions(name: str, loss: Callable[[_Keeps], AbsLoss]) -> None:
    torch.manual_seed(0)
    network = _Keeps()
    tasks = {
        task: {"metrics": ["L1"], "metrics_fn": L1Metric(), "loss_fn": made, "weight": [0]}
        for task, made in zip(TASKS, (MSELoss(), loss(network)), strict=True)
    }
    decoders = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})
    options: dict[str, Any] = {"task_dict": tasks, "encoder_class": lambda: network, "decoders": decoders}
    trainer = _trainer(name, "none", **options)
    if name in ("MGDA", "EW"):
        _, heads = _step_weights(trainer, _batch())
        torch.testing.assert_close(heads, torch.ones(2))
    x, labels = _batch()
    rows: list[Any] = [(x[i], {task: labels[task][i] for task in TASKS}) for i in range(8)]
    trainer.train(DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4), 2)


def test_the_inputs_gradients_and_representations_do_not_go_together() -> None:
    torch.manual_seed(0)
    network = _Keeps()
    tasks = {
        task: {"metrics": ["L1"], "metrics_fn": L1Metric(), "loss_fn": made, "weight": [0]}
        for task, made in zip(TASKS, (MSELoss(), _Slope(network)), strict=True)
    }
    trainer: Any = _trainer("MGDA", "none", task_dict=tasks, encoder_class=lambda: network, rep_grad=True)
    trainer.model.epoch = 0
    with pytest.raises(UsageError, match="rep_grad must be False here, as a loss depends on more"):
        trainer.step([_batch()], StepBuffer())


def test_inputs_of_their_own_without_the_other_task_are_refused() -> None:
    trainer: Any = _trainer("MGDA", "loss", multi_input=True)
    trainer.model.epoch = 0
    x, labels = _batch()
    trainer.step([({"ctr": x}, {"ctr": labels["ctr"]})], StepBuffer(), [0])
    with pytest.raises(UsageError, match="The loss of ctcvr depends on what an earlier pass"):
        trainer.step([({"ctcvr": x}, {"ctcvr": labels["ctcvr"]})], StepBuffer(), [1])


class _Unused(_Slope):
    """Takes the derivative as programs do that may have none."""

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        slope = torch.autograd.grad(pred.sum(), self.encoder.x, create_graph=True, allow_unused=True)[0]
        return (slope[:, :1] - gt).square().mean()


class _Averaging(AbsLoss):
    """Divides by a running mean of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor | float = 1.0

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        loss = (pred - gt).square().mean()
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss / self.mean


class _Dropping(nn.Module):
    """Leaves out a layer by Python's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.first(x).tanh()
        return found if random.random() < 0.5 else self.second(found)


class _Normalised(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], AbsLoss], bool]] = {
    "unused": (_Keeps, _Unused, False),
    "averaging": (_Keeps, lambda network: _Averaging(), True),
    "dropping": (_Dropping, lambda network: MSELoss(), True),
    "normalised": (_Normalised, lambda network: MSELoss(), True),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", NETWORKS)
def test_what_may_be_cut(case: str, precision: str) -> None:
    make, loss, may = NETWORKS[case]
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    network = make()
    made = loss(network)
    tasks = {
        task: {"metrics": ["L1"], "metrics_fn": L1Metric(), "loss_fn": each, "weight": [0]}
        for task, each in zip(TASKS, (MSELoss(), made), strict=True)
    }
    trainer: Any = _trainer("MGDA", "none", task_dict=tasks, encoder_class=lambda: network, precision=precision)
    trainer.model.epoch = 0
    trainer.step([_batch()], StepBuffer())
    assert (trainer.step.engine.method.structure.against_cut is None) is may
    if case == "averaging":
        seen = trainer.step.latest.losses[1] * made.mean
        torch.testing.assert_close(torch.as_tensor(made.mean), 0.9 + 0.1 * seen.float(), rtol=1e-4, atol=1e-5)
