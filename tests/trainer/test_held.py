"""Steps with weights held from an earlier solve, in a network of one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.architecture import HPS
from fastmtl.engine.weights import Weights
from fastmtl.trainer.tasks import step_tasks
from tests.trainer.toy import count_vjps, loaders, make_trainer


class _OnePiece(HPS):
    def forward(self, inputs: Any, task_name: str | None = None) -> Any:
        return super().forward(inputs, task_name)


class _TwoServed(_OnePiece):
    """The decoders of the first two tasks share a layer that the third one does not use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pair = nn.Linear(8, 8)

    def forward(self, inputs: Any, task_name: str | None = None) -> Any:
        rep = self.encoder(inputs)
        return {task: self.decoders[task](rep if task == "task2" else self.pair(rep).tanh()) for task in self.task_name}


def _grads(architecture: Any, shared: Tensor, heads: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
    """By name the gradient of a step with these weights, and the same from a backward pass of each task."""
    trainer = make_trainer("Nash_MTL", architecture, count=3, update_weights_every=2)
    inputs, labels = next(iter(loaders(3)))
    model, problem = trainer.model, trainer.step.problem
    params = dict(model.named_parameters())
    own = {id(param) for param in problem.task_params}
    expected = {name: torch.zeros_like(param) for name, param in params.items()}
    for t, loss in enumerate(problem.whole(inputs, labels)[0]):
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
        for (name, param), grad in zip(params.items(), grads, strict=True):
            weight = shared[t] if id(param) not in own else 1.0 if heads is None else heads[t]
            if grad is not None:
                expected[name] += weight * grad
    engine, weights = trainer.step.engine, Weights(shared=shared, heads=heads)
    ctx = trainer.step._context([(inputs, labels)], step_tasks([0, 1, 2], trainer.task_name))
    engine.differentiate(ctx, weights).write_grads(weights)
    return {name: (param.grad, expected[name]) for name, param in params.items() if param.grad is not None}


@pytest.mark.parametrize("heads", [None, torch.tensor([0.5, 2.0, 3.0])], ids=["ones", "heads"])
@pytest.mark.parametrize("shared", [[1.0, 0.5, 2.0], [0.0, 1.0, 0.0], [-1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize(("architecture", "passes"), [(_OnePiece, 1), (_TwoServed, 2)])
def test_each_parameter_gets_its_weighted_gradient(
    architecture: Any, passes: int, shared: list[float], heads: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = count_vjps(monkeypatch)
    found = _grads(architecture, torch.tensor(shared), heads)
    assert len(runs) == passes
    assert len(found) > 6
    for got, want in found.values():
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
