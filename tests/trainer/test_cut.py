"""Networks that may be differentiated trunk and heads apart, and those that may not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastmtl.errors import UsageError
from fastmtl.loss import AbsLoss, MSELoss
from fastmtl.trainer.log.records import StepBuffer
from tests.trainer.coupled import TASKS, coupled_batch, coupled_trainer, flattened, step_weights, tasks

pytestmark = pytest.mark.usefixtures("in_float64")


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
    task_dict = tasks(MSELoss(), loss(network))
    decoders = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})
    options: dict[str, Any] = {"task_dict": task_dict, "encoder_class": lambda: network, "decoders": decoders}
    trainer = coupled_trainer(name, "none", **options)
    if name in ("MGDA", "EW"):
        _, heads = step_weights(trainer, coupled_batch())
        torch.testing.assert_close(heads, torch.ones(2))
    x, labels = coupled_batch()
    rows: list[Any] = [(x[i], {task: labels[task][i] for task in TASKS}) for i in range(8)]
    trainer.train(DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4), 2)


def test_the_inputs_gradients_and_representations_do_not_go_together() -> None:
    torch.manual_seed(0)
    network = _Keeps()
    task_dict = tasks(MSELoss(), _Slope(network))
    trainer: Any = coupled_trainer("MGDA", "none", task_dict=task_dict, encoder_class=lambda: network, rep_grad=True)
    trainer.model.epoch = 0
    with pytest.raises(UsageError, match="rep_grad must be False here, as a loss depends on more"):
        trainer.step([coupled_batch()], StepBuffer())


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
    task_dict = tasks(MSELoss(), made)
    trainer: Any = coupled_trainer(
        "MGDA", "none", task_dict=task_dict, encoder_class=lambda: network, precision=precision
    )
    trainer.model.epoch = 0
    trainer.step([coupled_batch()], StepBuffer())
    assert (trainer.step.engine.method.structure.against_cut is None) is may
    if case == "averaging":
        seen = trainer.step.latest.losses[1] * made.mean
        torch.testing.assert_close(torch.as_tensor(made.mean), 0.9 + 0.1 * seen.float(), rtol=1e-4, atol=1e-5)


class _Remembering(AbsLoss):
    """Counts in place, and holds tensors that nothing may be written into."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = torch.zeros(())
        self.same = torch.ones(()).expand(2)
        with torch.inference_mode():
            self.fixed = torch.ones(2)

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        self.calls += 1
        return (pred - gt).square().mean() * self.same[0].item() * self.fixed[0].item()


def test_looking_leaves_no_trace_in_losses() -> None:
    loss = _Remembering()
    trainer: Any = coupled_trainer("MGDA", "none", task_dict=tasks(MSELoss(), loss))
    trainer.model.epoch = 0
    for _ in range(2):
        trainer.step([coupled_batch()], StepBuffer())
    assert loss.calls == 2


@pytest.mark.slow
@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize("kind", ["product", "kept"])
def test_compiled_steps_are_those_of_eager_ones(kind: str) -> None:
    found = []
    for compiles in (False, True):
        trainer: Any = coupled_trainer("MGDA", kind, compile=compiles)
        trainer.model.epoch = 0
        for _ in range(2):
            trainer.step([coupled_batch()], StepBuffer())
        found.append(flattened(list(trainer.model.parameters())))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-15)
