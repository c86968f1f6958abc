"""M-ConFIG: one task's gradient a step, and Adam moves along the conflict-free update of the averages."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.utils import set_random_seed
from tests.trainer.toy import flat, loaders, make_trainer

COUNT = 3
BETAS = (0.8, 0.95)
ADAM: dict[str, Any] = {"optim": "adam", "lr": 1e-2, "betas": BETAS}


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _trainer(**options: Any) -> Any:
    return make_trainer("MConFIG", count=COUNT, **{"optim_param": ADAM, "tasks_per_step": None} | options)


def _batches(trainer: Any) -> list[Any]:
    to_default = torch.get_default_dtype()
    return [
        (x.to(to_default), {task: y.to(to_default) if y.is_floating_point() else y for task, y in labels.items()})
        for x, labels in loaders(COUNT, rows=32, batch=8)
    ]


class _Paper:
    """The algorithm as published, on vectors: the direction by a pseudo-inverse, and Adam's update written out."""

    def __init__(self, model: Any, losses: Any) -> None:
        self.model, self.losses = copy.deepcopy(model), losses
        self.params = list(self.model.get_share_params())
        size = sum(param.numel() for param in self.params)
        self.m, self.n = torch.zeros(COUNT, size), torch.zeros(COUNT)
        self.last, self.v, self.k = torch.zeros(size), torch.zeros(size), 0
        self.heads = {
            task: torch.optim.Adam(head.parameters(), lr=ADAM["lr"], betas=BETAS)
            for task, head in self.model.decoders.items()
        }

    def step(self, x: Tensor, labels: dict[str, Tensor], drawn: list[str]) -> None:
        beta1, beta2 = BETAS
        self.model.zero_grad()
        for task in drawn:
            place = int(task.removeprefix("task"))
            loss = self.losses[task].compute_loss(self.model(x)[task], labels[task])
            head = list(self.model.decoders[task].parameters())
            grads = torch.autograd.grad(loss, [*self.params, *head])
            self.m[place].mul_(beta1).add_((1 - beta1) * flat(grads[: len(self.params)]))
            self.n[place] += 1
            for param, grad in zip(head, grads[len(self.params) :], strict=True):
                param.grad = grad
            self.heads[task].step()
        self.k += 1
        known = self.n > 0
        moments = self.m[known] / (1 - beta1 ** self.n[known])[:, None]
        direction = torch.linalg.pinv(moments / moments.norm(dim=1, keepdim=True)).sum(1)
        direction = direction / direction.norm()
        direction = direction * (moments @ direction).sum()
        moment = (1 - beta1**self.k) * direction
        pseudo = (moment - beta1 * self.last) / (1 - beta1)
        self.last = moment
        self.v = beta2 * self.v + (1 - beta2) * pseudo**2
        moved = ADAM["lr"] * direction / ((self.v / (1 - beta2**self.k)).sqrt() + 1e-8)
        with torch.no_grad():
            for param, part in zip(self.params, moved.split([p.numel() for p in self.params]), strict=True):
                param.sub_(part.view_as(param))


@pytest.mark.parametrize("tasks", [None, 2, 3], ids=["one", "two", "all"])
def test_follows_the_published_algorithm(tasks: int | None, float64: None) -> None:
    trainer = _trainer(tasks_per_step=tasks)
    paper = _Paper(trainer.model, trainer.meter.losses)
    seen: list[str] = []
    for x, labels in 3 * _batches(trainer):
        drawn = list(trainer.step([(x, labels)], StepBuffer())[0])
        paper.step(x, labels, drawn)
        seen += drawn
        torch.testing.assert_close(flat(trainer.model.parameters()), flat(paper.model.parameters()), rtol=0, atol=1e-11)
    assert len(seen) == 12 * (tasks or 1)
    assert [seen.count(f"task{t}") for t in range(COUNT)] == [4 * (tasks or 1)] * COUNT


def test_the_averages_of_absent_tasks_stay() -> None:
    trainer = _trainer()
    (batch, *_) = _batches(trainer)
    for _ in range(4):
        before = trainer.model.task_moments.clone()
        (task,) = trainer.step([batch], StepBuffer())[0]
        changed = trainer.model.task_moments.ne(before).any(1)
        assert changed.nonzero().flatten().tolist() == [int(task.removeprefix("task"))]


def test_resumes_to_the_bit(tmp_path: Path) -> None:
    def run(epochs: int, **more: Any) -> Tensor:
        trainer = _trainer(**more)
        if "resume" not in more:
            set_random_seed(5)
        trainer.train(loaders(COUNT), loaders(COUNT), epochs)
        return flat([*trainer.model.parameters(), *trainer.model.buffers()])

    run(1, save_path=str(tmp_path))
    assert torch.equal(run(3, resume=str(tmp_path / "last.pt")), run(3))


def test_a_schedule_may_change_beta1(float64: None) -> None:
    trainer = _trainer(optim_param={"optim": "adamw", "lr": 0.0})
    (batch, *_) = _batches(trainer)
    for beta in (0.9, 0.7, 0.8, 0.95):
        trainer.optimizer.param_groups[0]["betas"] = (beta, 0.999)
        trainer.step([batch], StepBuffer())
        moments = [trainer.optimizer.state[param]["exp_avg"] for param in trainer.model.get_share_params()]
        torch.testing.assert_close(flat(moments), trainer.model.adam_moment[0])
    # The parameters have not moved, so averages without bias are the gradients, whatever their weights.
    unbiased = trainer.model.task_moments / trainer.model.mass[:, None]
    for place, task in enumerate(trainer.task_name):
        loss = trainer.meter.losses[task].compute_loss(trainer.model(batch[0])[task], batch[1][task])
        grads = torch.autograd.grad(loss, list(trainer.model.get_share_params()))
        torch.testing.assert_close(unbiased[place], flat(grads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_param": {"optim": "sgd", "lr": 0.1}}, "must be Adam or AdamW, got SGD"),
        ({"optim_param": {"optim": "nadam", "lr": 0.1}}, "must be Adam or AdamW, got NAdam"),
        ({"optim_param": {**ADAM, "params": {"decoders": {"betas": (0.5, 0.9)}}}}, "one beta1 for all parameters"),
        ({"clip_grad_norm": 1.0}, "clip_grad_norm would change"),
        ({"compile": True}, "MConFIG, whose steps do not have all tasks, cannot be combined with compile=True"),
    ],
    ids=["sgd", "nadam", "groups", "clip", "compile"],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _trainer(**options)
