"""With cuda_graph="auto" steps run eagerly and captured in turn, and the faster way stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastmtl.trainer.compile import capture
from fastmtl.trainer.compile.capture import (
    CaptureTrial,
    StepCapture,
    make_capture,
    run_eagerly,
)
from fastmtl.trainer.compile.trial import Trial
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.setup.combinations import check_distributed
from fastmtl.trainer.setup.options import StepOptions
from tests.trainer.test_capture import CUDA, Rerun
from tests.trainer.toy import Listener, flat, loaders, make_trainer


class _Clock:
    """Stands in for the module time in the trial; what it shows is set by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def _tried(monkeypatch: pytest.MonkeyPatch, name: str, count: int = 3) -> tuple[Any, Rerun, list[str], _Clock]:
    """Return a trainer whose steps are run eagerly and captured in turn."""
    clock, said = _Clock(), list[str]()
    monkeypatch.setattr("fastmtl.trainer.compile.trial.time", clock)
    monkeypatch.setattr("fastmtl.trainer.compile.capture.time", clock)
    trainer: Any = make_trainer(name, count=count)
    graph = Rerun(trainer)
    captured = StepCapture(trainer.model, trainer.optimizer, graph, said.append)
    trainer.step.capture = CaptureTrial(captured, trainer.step.trial, said.append)
    trainer.model.epoch = 0
    return trainer, graph, said, clock


@pytest.mark.parametrize(("seconds", "chosen"), [(0.01, "captured"), (0.04, "eager")])
@pytest.mark.parametrize("name", ["EW", "MoCo"])
def test_auto_keeps_the_faster(name: str, seconds: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_trainer(name, count=3)
    plain.model.epoch = 0
    trainer, graph, said, clock = _tried(monkeypatch, name)
    (batch,) = loaders(3, batch=24)
    replays = []
    for step in range(60):
        # Some steps lack a task.
        present = [0, 2] if step % 5 == 4 else None
        plain.step([batch], StepBuffer(), present)
        trainer.step([batch], StepBuffer(), present)
        clock.now += seconds if trainer.step.capture.capture.replayed else 0.02
        replays.append(trainer.step.capture.capture.replays)
    assert said == [
        "cuda_graph: captured the step",
        f"cuda_graph: a step takes eager 20.0 ms, captured {1e3 * seconds:.1f} ms: going on {chosen}",
    ]
    assert graph.is_there == (chosen == "captured")
    assert replays[-1] - replays[-6] == (4 if chosen == "captured" else 0)
    torch.testing.assert_close(flat(trainer.model.parameters()), flat(plain.model.parameters()))


@pytest.mark.parametrize(("length", "pays"), [(4, False), (40, True)])
def test_auto_weighs_what_new_captures_cost(length: int, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, graph, said, clock = _tried(monkeypatch, "EW")
    batch = next(iter(loaders(3)))
    record = graph.capture

    def slowly(function: Callable[[], Any]) -> Any:
        clock.now += 0.3
        return record(function)

    monkeypatch.setattr(graph, "capture", slowly)
    for step in range(200):
        # Every epoch has a graph of its own.
        trainer.model.epoch = max(0, step - 60) // length
        trainer.step([batch], StepBuffer())
        clock.now += 0.01 if trainer.step.capture.capture.replayed else 0.02
    assert said[1].endswith("going on captured")
    stopped = "cuda_graph: the step runs eagerly from here on, as new captures cost more than replays save"
    assert said[2:] == ([] if pays else [stopped])
    assert graph.is_there == pays
    assert graph.captures == 1 + 3


def test_auto_first_lets_the_engine_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, graph, said, clock = _tried(monkeypatch, "MGDA", count=8)
    batch = next(iter(loaders(8)))
    assert not trainer.step.trial.settled
    while not trainer.step.trial.settled:
        assert trainer.step.capture.capture.replays == graph.captures == 0
        trainer.step([batch], StepBuffer())
        clock.now += 0.02
    for _ in range(40):
        trainer.step([batch], StepBuffer())
        clock.now += 0.01 if trainer.step.capture.capture.replayed else 0.02
    assert said[-1].endswith("going on captured")


def test_auto_says_once_what_keeps_a_step_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, graph, said, clock = _tried(monkeypatch, "MGDA")
    graph.reason = "not supported"
    batch = next(iter(loaders(3)))
    for _ in range(60):
        trainer.step([batch], StepBuffer())
        clock.now += 0.02
    assert said == ["cuda_graph: the step runs eagerly, as it cannot be captured: not supported"]


def test_auto_asks_for_a_gpu_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Listener()
    trainer = make_trainer("MGDA", cuda_graph="auto", logger=told)
    trainer.train(loaders(), loaders(), 1)
    assert trainer.step.capture is run_eagerly
    assert not told.messages
    monkeypatch.setattr(capture, "CudaGraph", lambda device: Rerun(trainer))

    def made(**options: Any) -> Any:
        said: list[str] = []
        engines: Any = Trial({"eager": trainer.step.engine}, said.append)
        made = make_capture(trainer.model, trainer.optimizer, StepOptions(**options), CUDA, engines, said.append)
        return made, said

    assert isinstance(made(cuda_graph="auto")[0], CaptureTrial)
    assert isinstance(made(cuda_graph=True)[0], StepCapture)
    assert made(cuda_graph=False) == (run_eagerly, [])
    # On a GPU it is asked for what cannot be.
    assert made(cuda_graph="auto", tasks_per_step=1) == (
        run_eagerly,
        ["cuda_graph: the step runs eagerly, as tasks_per_step draws the tasks on the host"],
    )


def test_auto_is_eager_where_several_processes_train() -> None:
    trainer = make_trainer("MGDA")
    assert check_distributed(trainer.model, "MGDA", StepOptions(cuda_graph="auto")).cuda_graph is False
