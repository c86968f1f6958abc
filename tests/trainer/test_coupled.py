"""Losses that depend on the predictions of several tasks: each has its whole gradient."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fastmtl import Trainer
from fastmtl.errors import UsageError
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting import WEIGHTINGS
from tests.trainer.coupled import TASKS, coupled_batch, coupled_trainer, flattened, gradient_rows, step_weights

pytestmark = pytest.mark.usefixtures("in_float64")

KINDS = ["product", "kept", "called", "loss", "one piece"]
# What a step does beyond gradients of the losses is tested elsewhere.
BALANCING = sorted(name for name, rule in WEIGHTINGS.items() if rule.needs == "gram" and rule.samples == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_mgda_goes_by_the_whole_gradients(kind: str) -> None:
    trainer = coupled_trainer("MGDA", kind)
    a, b = (flattened(row) for row in gradient_rows(trainer, coupled_batch())[0])
    shared, heads = step_weights(trainer, coupled_batch())
    first = (((b - a) @ b) / ((b - a) @ (b - a))).clamp(0, 1)
    torch.testing.assert_close(shared, torch.stack([first, 1 - first]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heads, torch.ones(2))


@pytest.mark.parametrize("name", BALANCING)
def test_all_strategies_see_the_whole_gradients(name: str) -> None:
    for cut, whole in zip(
        step_weights(coupled_trainer(name, "product"), coupled_batch()),
        step_weights(coupled_trainer(name, "one piece"), coupled_batch()),
        strict=True,
    ):
        torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("architecture", ["MMoE", "CGC", "Cross_stitch"])
@pytest.mark.parametrize("vjps", ["sequential", "batched", "layerwise"])
def test_architectures_and_ways(architecture: str, vjps: str) -> None:
    args = {"MMoE": {"img_size": [6], "num_experts": [2]}, "CGC": {"img_size": [6], "num_experts": [1, 1, 1]}}
    trainer = coupled_trainer(
        "MGDA", "product", architecture=architecture, vjps=vjps, arch_args=args.get(architecture, {})
    )
    _, heads = step_weights(trainer, coupled_batch())
    torch.testing.assert_close(heads, torch.ones(2))


@pytest.mark.parametrize("name", ["MoCo", "DB_MTL", "ExcessMTL", "MoDo", "FORUM", "GradNorm"])
def test_a_network_that_is_cut_learns_what_one_in_one_piece_does(name: str) -> None:
    found = []
    for kind in ("kept", "one piece"):
        trainer: Any = coupled_trainer(name, kind)
        assert trainer.model.splits is (kind == "kept")
        trainer.model.epoch, trainer.model.epochs = 0, 1
        for _ in range(3):
            trainer.step([coupled_batch()] * trainer.step.batches, StepBuffer())
        found.append(flattened(list(trainer.model.parameters())))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["product", "kept", "loss", "one piece"])
def test_representations_that_tasks_share(kind: str) -> None:
    trainer = coupled_trainer("MGDA", kind, rep_grad=True)
    shared, heads = step_weights(trainer, coupled_batch(), coupled_trainer("MGDA", kind))
    torch.testing.assert_close(shared, trainer.latest.weights.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(heads, torch.ones(2))


def test_representations_of_tasks_of_their_own_are_refused() -> None:
    trainer: Any = coupled_trainer(
        "MGDA", "product", rep_grad=True, architecture="MMoE", arch_args={"img_size": [6], "num_experts": [2]}
    )
    trainer.model.epoch = 0
    before = flattened(list(trainer.model.parameters())).clone()
    with pytest.raises(UsageError, match=r"rep_grad must be False for MMoE here: some loss depends on"):
        trainer.step([coupled_batch()], StepBuffer())
    assert torch.equal(before, flattened(list(trainer.model.parameters())))


@pytest.mark.parametrize("kind", ["product", "kept", "loss"])
@pytest.mark.parametrize("name", ["MGDA", "EW", "FORUM"])
@pytest.mark.parametrize("frozen", [False, True])
def test_tasks_without_labels_are_decoded_all_the_same(name: str, kind: str, frozen: bool) -> None:
    trainer: Any = coupled_trainer(name, kind)
    if frozen:
        trainer.model.encoder.requires_grad_(False)
        trainer.step = trainer.make_step(trainer.step.options)
    trainer.model.epoch, trainer.model.epochs = 0, 1
    x, labels = coupled_batch()
    if not frozen:
        trainer.step([(x, labels)] * trainer.step.batches, StepBuffer())
    for _ in range(2):
        params = [*trainer.step.problem.shared_params, *trainer.step.problem.task_params]
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
    x, labels = coupled_batch()
    parts: list[Any] = [(x, {task: labels[task]}) for task in TASKS]
    found = []
    for batches in (parts, parts[::-1], [(x, labels)]):
        trainer: Any = coupled_trainer("MGDA", kind, accumulate=len(batches))
        trainer.model.epoch = 0
        for _ in range(2):
            trainer.step(batches, StepBuffer())
        found.append(flattened(list(trainer.model.parameters())))
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1], found[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["product", "kept", "loss"])
@pytest.mark.parametrize("name", ["MGDA", "EW", "FAMO", "FORUM", "GradDrop"])
@pytest.mark.parametrize("seed", [0, 1], ids=["ctcvr first", "ctr first"])
def test_drawn_tasks_train(name: str, kind: str, seed: int) -> None:
    x, labels = coupled_batch()
    random.seed(seed)
    rows: list[Any] = [(x[i], {task: labels[task][i] for task in TASKS}) for i in range(8)]
    options: dict[str, Any] = {"rep_grad": True} if name == "GradDrop" else {}
    trainer = coupled_trainer(name, kind, tasks_per_step=1, **options)
    before = flattened(list(trainer.model.parameters())).clone()
    trainer.train(DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4), 2)
    assert (flattened(list(trainer.model.parameters())) != before).any()


def test_a_loss_that_joins_later() -> None:
    """From the second epoch on the second task's loss reads the first one's prediction."""

    class Later(Trainer):
        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            first, second = (preds[task].sigmoid() for task in TASKS)
            return {"ctr": first, "ctcvr": first * second if self.model.epoch else second}

    trainer: Any = coupled_trainer("MGDA", "none", trainer_class=Later)
    trainer.model.epoch, trainer.model.epochs = 0, 2
    trainer.step([coupled_batch()], StepBuffer())
    trainer.model.epoch = 1
    a, b = (flattened(row) for row in gradient_rows(trainer, coupled_batch())[0])
    before = flattened(trainer.step.problem.shared_params).clone()
    trainer.step([coupled_batch()], StepBuffer())
    first = (((b - a) @ b) / ((b - a) @ (b - a))).clamp(0, 1)
    moved = (before - flattened(trainer.step.problem.shared_params)) / 0.5
    torch.testing.assert_close(moved, first * a + (1 - first) * b, rtol=1e-5, atol=1e-8)


def test_a_hook_that_leaves_out_a_task_is_told() -> None:
    class Leaves(Trainer):
        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            return {"ctr": preds["ctr"]}

    trainer: Any = coupled_trainer("MGDA", "none", trainer_class=Leaves)
    trainer.model.epoch = 0
    with pytest.raises(UsageError, match="process_preds must return a dictionary with a prediction for every task"):
        trainer.step([coupled_batch()], StepBuffer())


def test_tasks_with_inputs_of_their_own() -> None:
    """The second task's loss reads what the first one's decoder has made of its own inputs."""
    trainer: Any = coupled_trainer("MGDA", "loss", multi_input=True)
    trainer.model.epoch = 0
    x, labels = coupled_batch()
    problem = trainer.step.problem
    params = [*problem.shared_params, *problem.task_params]
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


def test_inputs_of_their_own_without_the_other_task_are_refused() -> None:
    trainer: Any = coupled_trainer("MGDA", "loss", multi_input=True)
    trainer.model.epoch = 0
    x, labels = coupled_batch()
    trainer.step([({"ctr": x}, {"ctr": labels["ctr"]})], StepBuffer(), [0])
    with pytest.raises(UsageError, match="The loss of ctcvr depends on tensors of an earlier pass"):
        trainer.step([({"ctcvr": x}, {"ctcvr": labels["ctcvr"]})], StepBuffer(), [1])
