"""Early stopping of runs and of tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl.errors import UsageError
from fastmtl.metrics import AbsMetric
from fastmtl.trainer.log.jsonl import JsonlLogger, read_jsonl
from fastmtl.trainer.log.meter import PerformanceMeter
from fastmtl.trainer.stopping import EarlyStopping
from fastmtl.weighting import EW
from tests.trainer.toy import flat, loaders, make_trainer, task_dict

ADAM = {"optim": "adam", "lr": 1e-2}


class _Scripted(AbsMetric):
    """A score of each evaluation, training passes left out, whatever is predicted."""

    missing = -1

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Take nothing in."""

    def score_fun(self) -> list[float]:
        """Return the score of the epoch."""
        return [self.scores[self.pass_ // 2]]

    pass_ = -1

    def reinit(self) -> None:
        self.pass_ += 1


def _tasks(*scores: list[float]) -> dict[str, dict[str, Any]]:
    """Tasks with given test scores by epoch, of which more is better."""
    tasks = task_dict(len(scores))
    for task, of_task in zip(tasks.values(), scores, strict=True):
        task |= {"metrics": ["score"], "metrics_fn": _Scripted(of_task), "weight": [1]}
    return tasks


UP, FALLS = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95], [0.5, 0.6, 0.5, 0.4, 0.3, 0.2]


def test_a_run_ends_when_no_task_has_improved() -> None:
    late = [0.5, 0.5, 0.5, 0.7, 0.6, 0.6, 0.6, 0.6]
    trainer = make_trainer("EW", task_dict=_tasks([0.5, 0.6, *[0.4] * 6], late), early_stopping=2)
    weights = trainer.train(loaders(), loaders(), 8, return_weight=True)
    assert trainer.stopping.last == 5
    assert {task: best["epoch"] for task, best in trainer.stopping.best.items()} == {"task0": 1, "task1": 3}
    assert trainer.stopping.best["task1"]["result"] == [0.7]
    assert weights.shape == (2, 6, 3)


def test_a_later_call_begins_anew() -> None:
    trainer = make_trainer("EW", task_dict=_tasks(FALLS + UP, FALLS + UP), early_stopping=1)
    trainer.train(loaders(), loaders(), 6)
    assert trainer.stopping.last == 2
    trainer.train(loaders(), loaders(), 1)
    assert trainer.stopping.last is None


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["HPS", "MMoE"])
@pytest.mark.parametrize("weighting", ["EW", "MGDA", "PCGrad", "FAMO", "UW", "DWA"])
@pytest.mark.parametrize("multi_input", [False, True], ids=["single", "multi"])
def test_a_stopped_task_is_as_one_without_labels(weighting: str, architecture: str, multi_input: bool) -> None:
    options = {"optim_param": ADAM, "multi_input": multi_input}
    if architecture == "MMoE":
        options["arch_args"] = {"num_experts": [2], "img_size": [6]}
    data = loaders(3, multi_input=multi_input)
    tasks = _tasks(UP, FALLS, UP)
    trainer = make_trainer(weighting, architecture, 3, task_dict=tasks, task_patience={"task1": 2}, **options)
    trainer.train(data, loaders(3, multi_input=multi_input), 5)
    assert trainer.stopping.stopped == {"task1": 3}
    assert trainer.stopping.last is None

    other = make_trainer(weighting, architecture, 3, task_dict=_tasks(UP, FALLS, UP), **options)
    seen = _Dropping(data, "task1", 4, multi_input)
    other.train(seen.loaders, loaders(3, multi_input=multi_input), 5)
    assert torch.equal(flat(trainer.model.parameters()), flat(other.model.parameters()))


class _Dropping:
    """Loaders that have no labels of a task from an epoch on."""

    def __init__(self, data: Any, task: str, epoch: int, multi_input: bool) -> None:
        self.task, self.epoch = task, epoch
        self.loaders: Any = (
            {name: _Loader(loader, self, name) for name, loader in data.items()}
            if multi_input
            else _Loader(data, self, None)
        )


class _Loader:
    def __init__(self, loader: Any, dropping: _Dropping, name: str | None) -> None:
        self.loader, self.dropping, self.name, self.begun = loader, dropping, name, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        gone = self.begun > self.dropping.epoch
        for inputs, labels in self.loader:
            if not gone:
                yield inputs, labels
            elif self.name is None:
                yield inputs, {task: gt for task, gt in labels.items() if task != self.dropping.task}
            else:
                yield inputs, torch.full_like(labels, torch.nan) if self.name == self.dropping.task else labels


def test_its_decoder_stays_and_a_run_without_tasks_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = JsonlLogger(tmp_path / "metrics.jsonl")
    trainer = make_trainer(
        "MGDA", task_dict=_tasks(FALLS, UP[:3] + [0.0] * 5), task_patience={"task0": 1, "task1": 3}, logger=log
    )
    after: list[Tensor] = []
    move = trainer.schedule.after_step

    def after_step() -> None:
        move()
        after.append(flat(trainer.model.decoders["task0"].parameters()))

    monkeypatch.setattr(trainer.schedule, "after_step", after_step)
    trainer.train(loaders(), loaders(), 8)
    assert trainer.stopping.stopped == {"task0": 2, "task1": 5}
    assert len(after) == 6 * 3
    assert all(torch.equal(now, after[8]) for now in after[9:])
    assert not torch.equal(after[7], after[8])
    (stop,) = (row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["event"] == "stop")
    assert stop == {"event": "stop", "epoch": 5, "best_epochs": {"task0": 1, "task1": 2}}


@pytest.mark.parametrize("at", [1, 3, 4])
def test_resumes_exactly(at: int, tmp_path: Path) -> None:
    def trainer(epochs: int, **more: Any) -> Any:
        tasks = _tasks(UP, FALLS) if epochs else _tasks(UP[at:], FALLS[at:])
        return make_trainer("MGDA", task_dict=tasks, task_patience={"task1": 1}, optim_param=ADAM, **more)

    whole = trainer(6)
    whole.train(loaders(), loaders(), 6)
    trainer(at, save_path=str(tmp_path)).train(loaders(), loaders(), at)
    resumed = trainer(0, resume=str(tmp_path / "last.pt"))
    resumed.train(loaders(), loaders(), 6)
    assert torch.equal(flat(whole.model.parameters()), flat(resumed.model.parameters()))
    assert resumed.stopping.state_dict() == whole.stopping.state_dict()
    assert resumed.stopping.stopped == {"task1": 2}


def test_a_run_that_was_stopped_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"task_dict": _tasks(FALLS, FALLS), "early_stopping": 1}
    make_trainer("EW", save_path=str(tmp_path), **options).train(loaders(), loaders(), 6)
    resumed = make_trainer("EW", resume=str(tmp_path), **options)
    before = flat(resumed.model.parameters())
    resumed.train(loaders(), loaders(), 6)
    assert "Nothing is left to train: the run was stopped early, after 3 epochs." in capsys.readouterr().out
    assert torch.equal(before, flat(resumed.model.parameters()))


def test_a_resumed_run_goes_by_its_own_patience(tmp_path: Path) -> None:
    def trainer(**options: Any) -> Any:
        return make_trainer("EW", task_dict=_tasks(FALLS, FALLS), **options)

    trainer(save_path=str(tmp_path), early_stopping=1).train(loaders(), loaders(), 6)
    for patience, last in ((None, None), (3, 4)):
        resumed = trainer(resume=str(tmp_path), early_stopping=patience)
        resumed.train(loaders(), loaders(), 6)
        assert resumed.stopping.last == last


def test_a_task_without_patience_any_more_is_trained_again(tmp_path: Path) -> None:
    options = {"task_dict": _tasks(FALLS, FALLS)}
    first = make_trainer("EW", save_path=str(tmp_path), task_patience={"task1": 1}, **options)
    first.train(loaders(), loaders(), 4)
    assert list(first.stopping.stopped) == ["task1"]
    assert list(make_trainer("EW", resume=str(tmp_path), task_patience={"task1": 1}, **options).stopping.stopped)
    assert not make_trainer("EW", resume=str(tmp_path), **options).stopping.stopped


def test_validation_data_decide_and_the_result_is_of_the_test_data() -> None:
    # Passes of an epoch: train, val, test.
    class Three(_Scripted):
        def score_fun(self) -> list[float]:
            return [self.scores[self.pass_]]

    scores = [0, 0.5, 0.91, 0, 0.6, 0.92, 0, 0.5, 0.93, 0, 0.5, 0.94]
    tasks = _tasks(UP, UP)
    for task in tasks.values():
        task["metrics_fn"] = Three(scores)
    trainer = make_trainer("EW", task_dict=tasks, early_stopping=2)
    trainer.train(loaders(), loaders(), 9, val_dataloaders=loaders())
    assert trainer.stopping.last == 3
    assert trainer.stopping.best["task0"] == {"improvement": pytest.approx(0.2), "epoch": 1, "result": [0.92]}


def test_lower_is_better_and_nan_is_no_improvement() -> None:
    meter = PerformanceMeter(_tasks(UP, UP))
    stopping = EarlyStopping(["task0", "task1"], 2)
    found = []
    for epoch, (one, two) in enumerate([(0.0, 0.0), (0.1, float("nan")), (float("nan"), 0.05), (0.1, 0.05), (0.1, 0)]):
        meter.improvements = {"task0": one, "task1": two}
        meter.results = {"task0": [one], "task1": [two]}
        stopping.after_epoch(epoch, meter)
        found.append(stopping.last)
    assert found == [None, None, None, None, 4]
    assert [stopping.best[task]["epoch"] for task in stopping.tasks] == [1, 2]


class _Legacy(EW):
    def backward(self, losses: Tensor, **kwargs: Any) -> Any:
        losses.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping": 0}, "early_stopping must be at least 1"),
        ({"task_patience": {"task0": 0}}, "task_patience of task0 must be a whole number of at least 1"),
        ({"task_patience": {"tsk0": 2}}, "task of task_patience.*task0"),
        ({"task_patience": {"task0": 2}, "tasks_per_step": 1}, "tasks_per_step"),
        ({"task_patience": {"task0": 2}, "weighting": _Legacy}, "written for all tasks"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_trainer(**{"weighting": "MGDA", **options})


def test_a_patience_needs_labels_to_judge_by() -> None:
    trainer = make_trainer("EW", task_patience={"task1": 2})
    unlabelled = _Dropping(loaders(), "task1", 0, False).loaders
    with pytest.raises(UsageError, match="task_patience of task1 needs labels of it in the test data"):
        trainer.train(loaders(), unlabelled, 3)
