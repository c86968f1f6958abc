"""Captured steps: with a stand-in for the graph everywhere, with CUDA's where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
import torch

from fastmtl import Trainer
from fastmtl._loss.base import is_complete
from fastmtl.engine.trees import leaves
from fastmtl.loss import MSELoss
from fastmtl.trainer.compile.capture import (
    StepCapture,
    make_capturable,
    reason_against,
)
from fastmtl.trainer.compile.graph import CudaGraph
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.precision import LossScaler
from fastmtl.trainer.setup.options import StepOptions
from fastmtl.weighting import WEIGHTINGS, AbsWeighting, Weights
from tests.trainer.toy import Listener, encoder, flat, loaders, make_trainer, task_dict

CAPTURED = sorted(name for name, rule in WEIGHTINGS.items() if rule.needs != "lookahead")
CUDA = torch.device("cuda")


class _Places(list[Any]):
    """Where an outcome will be, once a replay has filled it in."""

    losses, preds, weights, gram = (property(itemgetter(index)) for index in range(4))
    gram_error, by_group = None, (None, None)


class Rerun(CudaGraph):
    """Records the function and runs it again at each replay, writing results where the first ones were.

    A graph would go on with the memory that was there at its capture, so that has to be in its place at each replay.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.captures = 0
        self.reason = ""
        self.place: str | None = None
        self.is_there = False

    def eagerly(self, function: Callable[[], Any]) -> Any:
        return function()

    def watched(self, function: Callable[[], Any]) -> tuple[Any, str | None]:
        return function(), self.place

    def discard(self) -> None:
        self.is_there = False

    def capture(self, function: Callable[[], Any]) -> Any:
        if self.reason:
            raise RuntimeError(self.reason)
        self.captures += 1
        self.is_there = True
        self.function = function
        self.places = self._places()
        self.result = _Places([None] * 4)
        return self.result

    def _places(self) -> dict[str, int]:
        """Where everything lies that a step leaves for the next one."""
        state = self.trainer.optimizer.state_dict()["state"]
        kept = {f"optimizer.{index}.{key}": each for index, of in state.items() for key, each in of.items()}
        scale = self.trainer.step.scaler.state_dict().get("scaler", {})
        tensors = self.trainer.model.state_dict() | kept | scale
        return {name: each.data_ptr() for name, each in tensors.items() if isinstance(each, torch.Tensor)}

    def replay(self) -> None:
        assert self._places() == self.places
        found = self.function()
        assert self._places() == self.places
        if self.result[0] is None:
            self.result[:] = found
            return
        for mine, new in zip(self.result, found, strict=True):
            for place, value in zip(_flat(mine), _flat(new), strict=True):
                place.detach().copy_(value)


def _flat(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in leaves(value) if leaf is not None]


def _captured(name: str | type[AbsWeighting], **options: Any) -> tuple[Any, Rerun, list[str]]:
    needs = WEIGHTINGS[name].needs if isinstance(name, str) else name.needs
    trainer = make_trainer(name, count=3, rep_grad=needs == "reps", **options)
    graph, said = Rerun(trainer), list[str]()
    trainer.step.capture = StepCapture(trainer.model, trainer.optimizer, graph, said.append)
    return trainer, graph, said


@pytest.mark.parametrize("name", CAPTURED)
def test_equals_eager_steps(name: str) -> None:
    scheduler = {"scheduler_param": {"scheduler": "step", "step_size": 1, "gamma": 0.5}}
    eager = make_trainer(name, count=3, rep_grad=WEIGHTINGS[name].needs == "reps", **scheduler)
    captured, graph, said = _captured(name, **scheduler)
    # Of six batches the last is smaller; where a step takes several, every other step had another layout.
    rows = 44 if captured.step.batches == 1 else 48
    for trainer in (eager, captured):
        torch.manual_seed(5)
        trainer.train(loaders(3, rows=rows), loaders(3), 2, return_weight=True)
    for key, value in eager.model.state_dict().items():
        torch.testing.assert_close(captured.model.state_dict()[key], value, msg=key)
    assert (eager.batch_weight == captured.batch_weight).all()
    assert graph.captures == 2
    assert captured.step.capture.replays >= 4
    assert said[0] == "cuda_graph: captured the step"
    assert said[1:] == ["cuda_graph: a batch whose shapes or contents differ runs eagerly"] * (rows == 44)


class Assigning(AbsWeighting):
    """Keeps its average by assigning to it."""

    needs = "losses"
    average: torch.Tensor

    def init_param(self) -> None:
        self.remember("average", torch.ones(self.task_num))

    def weigh(self, losses: torch.Tensor, gram: torch.Tensor | None, **hyper: Any) -> Weights:
        self.average = 0.5 * self.average + 0.5 * losses
        return Weights(shared=1 / self.average)


@pytest.mark.parametrize("name", [Assigning, "MoCo", "Nash_MTL", "FAMO"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_remembered_keeps_its_place(name: Any, precision: str) -> None:
    eager = make_trainer(name, count=3, precision=precision)
    captured, _, _ = _captured(name, precision=precision)
    (batch,) = loaders(3, batch=24)
    for trainer in (eager, captured):
        trainer.model.epoch = 0
        if isinstance(trainer.step.scaler, LossScaler):
            trainer.step.scaler.scale.fill_(2.0**8)
        for _ in range(6):
            trainer.step([batch], StepBuffer())
    assert captured.step.capture.replays == 3
    for key, value in eager.model.state_dict().items():
        torch.testing.assert_close(captured.model.state_dict()[key], value, msg=key)


def test_results_of_a_replay_stay_as_they_are() -> None:
    captured, _, _ = _captured("MGDA")
    captured.model.epoch = 0
    ((x, labels),) = loaders(3, batch=24)
    found = [captured.step([(x + k, labels)], StepBuffer()) for k in range(6)]
    kept = [[leaf.clone() for leaf in leaves(each)] for each in found]
    captured.step([(x, labels)], StepBuffer())
    assert captured.step.capture.replays == 4
    for each, before in zip(found, kept, strict=True):
        assert all(map(torch.equal, leaves(each), before))


def test_a_layout_that_stays_takes_over() -> None:
    eager, (captured, graph, said) = make_trainer("MGDA", count=3), _captured("MGDA")
    (whole,) = loaders(3, batch=24)
    sizes = [7, 8, 8, 9, 8, 8, 8, 8, 8] + [6] * 12 + [8]
    for trainer in (eager, captured):
        trainer.model.epoch = 0
        for size in sizes:
            trainer.step([(whole[0][:size], {task: each[:size] for task, each in whole[1].items()})], StepBuffer())
    assert torch.equal(flat(eager.model.parameters()), flat(captured.model.parameters()))
    assert graph.captures == 2
    assert captured.step.capture.replays == 4 + 2
    assert said == [
        "cuda_graph: a batch whose shapes or contents differ runs eagerly",
        "cuda_graph: captured the step",
        "cuda_graph: captured the step anew, for batches of other shapes or contents",
    ]


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        return self.inner(inputs["x"] * float(inputs["scale"]))


def test_what_is_no_tensor_is_not_frozen_into_the_graph() -> None:
    eager = make_trainer("MGDA", count=3, encoder_class=Scaled)
    captured, graph, _ = _captured("MGDA", encoder_class=Scaled)
    (x, labels), *_ = loaders(3)
    for trainer in (eager, captured):
        trainer.model.epoch = 0
        for scale in [1, 1, 1, 1, 2, 1]:
            trainer.step([({"scale": scale, "x": x}, labels)], StepBuffer())
            # The order of keys is nothing.
            trainer.step([({"x": x, "scale": scale}, labels)], StepBuffer())
    assert torch.equal(flat(eager.model.parameters()), flat(captured.model.parameters()))
    assert graph.captures == 1
    assert captured.step.capture.replays == 5


def test_batches_of_other_things_stay_eager() -> None:
    captured, graph, said = _captured("MGDA", encoder_class=Scaled)
    captured.model.epoch = 0
    (x, labels), *_ = loaders(3)
    for _ in range(5):
        captured.step([({"scale": np.ones(()), "x": x}, labels)], StepBuffer())
    assert graph.captures == 0
    assert said == ["cuda_graph: the step runs eagerly, as batches hold a ndarray, not only tensors"]


class _Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        return self.inner(inputs["x"])


def test_batches_that_all_differ_are_not_captured_and_this_is_said() -> None:
    captured, graph, said = _captured("MGDA", encoder_class=_Named)
    captured.model.epoch = 0
    (x, labels), *_ = loaders(3)
    for step in range(30):
        captured.step([({"x": x, "file": f"{step}.png"}, labels)], StepBuffer())
    assert graph.captures == 0
    assert captured.step.capture.failed
    assert len(said) == 2
    assert said[1].endswith("as 17 batches differ in their shapes, or in what is no tensor")


def test_a_graph_outlasts_many_other_layouts() -> None:
    captured, graph, said = _captured("MGDA", encoder_class=_Named)
    captured.model.epoch = 0
    (x, labels), *_ = loaders(3)
    for step in [0] * 6 + list(range(1, 40)) + [0] * 2:
        captured.step([({"x": x, "file": f"{step}.png"}, labels)], StepBuffer())
    assert (graph.captures, captured.step.capture.replays) == (1, 5)
    assert len(said) == 2


def test_whatever_keeps_a_step_from_being_captured_leaves_it_eager() -> None:
    class ReadsScale(_Named):
        def forward(self, inputs: Any) -> torch.Tensor:
            return self.inner(inputs["x"] * inputs["x"].scale)

    captured, _, said = _captured("MGDA", encoder_class=ReadsScale)
    captured.model.epoch = 0
    (x, labels), *_ = loaders(3)
    # A copy of a tensor lacks what was set on it.
    x.scale = 2.0
    captured.step.capture.graph.capture = lambda function: function()
    for _ in range(6):
        captured.step([({"x": x}, labels)], StepBuffer())
    assert said == [
        "cuda_graph: the step runs eagerly, as it cannot be captured: 'Tensor' object has no attribute 'scale'"
    ]


def test_a_capture_that_fails_leaves_the_step_eager() -> None:
    eager = make_trainer("MGDA", count=3)
    captured, graph, said = _captured("MGDA")
    graph.reason = "operation not permitted when stream is capturing\nCompile with ..."
    for trainer in (eager, captured):
        trainer.train(loaders(3, rows=48), loaders(3), 2)
    assert torch.equal(flat(eager.model.parameters()), flat(captured.model.parameters()))
    assert len(said) == 1
    assert said[0].endswith("cannot be captured: operation not permitted when stream is capturing")


def test_labels_known_to_be_whole_are_no_part_of_a_graph() -> None:
    known: list[bool] = []

    class Noting(MSELoss):
        def compute_loss(self, pred: torch.Tensor, gt: torch.Tensor) -> torch.Tensor:
            known.append(is_complete(self, gt))
            return super().compute_loss(pred, gt)

    captured, graph, _ = _captured(
        "EW", task_dict=task_dict(3) | {"task1": task_dict(3)["task1"] | {"loss_fn": Noting()}}
    )
    captured.model.epoch = 0
    batch = next(iter(loaders(3)))
    known.clear()
    for _ in range(5):
        captured.step([batch], StepBuffer(), complete=True)
    # A replay may be of other labels.
    assert graph.captures == 1
    assert known == [True] * 3 + [False] * 2


def test_a_step_that_waits_for_the_device_is_not_captured() -> None:
    eager = make_trainer("MGDA", count=3)
    captured, graph, said = _captured("MGDA")
    graph.place = "line 3 of losses.py, return loss.item()"
    for trainer in (eager, captured):
        trainer.train(loaders(3, rows=48), loaders(3), 2)
    assert torch.equal(flat(eager.model.parameters()), flat(captured.model.parameters()))
    assert graph.captures == 0
    assert said == [
        "cuda_graph: the step runs eagerly, as the host waits for the device in line 3 of losses.py, return loss.item()"
    ]


class _Foreign(AbsWeighting):
    """Written for LibMTL."""

    def backward(self, losses: torch.Tensor, **kwargs: Any) -> None:
        losses.sum().backward()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("MGDA", {"compile": True}, "compile is on"),
        ("MGDA", {"tasks_per_step": 1}, "draws the tasks"),
        ("MGDA", {"update_weights_every": 2}, "update_weights_every"),
        ("MGDA", {"weight_momentum": 0.5}, "weight_momentum"),
        ("MOML", {}, "looks ahead"),
    ],
    ids=str,
)
def test_reasons(name: str, options: dict[str, Any], reason: str) -> None:
    trainer = make_trainer(name)
    found = reason_against(trainer.model, trainer.optimizer, StepOptions(**options), CUDA)
    assert found is not None
    assert reason in found
    assert reason_against(make_trainer("MGDA").model, trainer.optimizer, StepOptions(), CUDA) is None
    foreign = make_trainer(_Foreign)
    written_for_libmtl = reason_against(foreign.model, foreign.optimizer, StepOptions(), CUDA)
    assert "LibMTL" in str(written_for_libmtl)


def test_adagrad_and_the_cpu_are_reasons() -> None:
    trainer = make_trainer("MGDA", optim_param={"optim": "adagrad", "lr": 1e-2})
    assert "Adagrad" in str(reason_against(trainer.model, trainer.optimizer, StepOptions(), CUDA))
    told = Listener()
    trainer = make_trainer("MGDA", cuda_graph=True, logger=told)
    trainer.train(loaders(), loaders(), 1)
    assert told.messages == ["cuda_graph: the step runs eagerly, as device is cpu, and only CUDA has graphs"]


def test_optimizers_are_made_capturable() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([param], fused=False)
    make_capturable(optimizer)
    assert optimizer.param_groups[0]["capturable"]
    make_capturable(torch.optim.SGD([param], lr=0.1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("optim", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("name", ["EW", "MGDA", "UW", "Nash_MTL", "MoCo", "FAMO", "GradNorm"])
def test_equals_eager_steps_on_cuda(name: str, optim: str) -> None:
    results = []
    for cuda_graph in (False, True):
        optimizer = {"optim": optim, "lr": 1e-2}
        # Engines that are tried round differently.
        trainer = make_trainer(
            name, count=3, device="cuda", cuda_graph=cuda_graph, optim_param=optimizer, vjps="sequential"
        )
        trainer.train(loaders(3, rows=64), loaders(3), 2)
        if cuda_graph:
            assert trainer.step.capture.replays == 5 + 7
        results.append(flat(trainer.model.parameters()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
