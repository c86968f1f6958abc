"""Learning rates where torch's schedulers would give others, or a traceback: resumed, warmed up, and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from fastmtl.errors import UsageError
from tests.trainer.test_schedules import STEPS, Run, by_epoch, train, trainer_with
from tests.trainer.toy import loaders

_NEVER = {"scheduler": "reduce", "mode": "max", "patience": 99}


@pytest.mark.parametrize(
    "before",
    [{"scheduler": "cos"}, {"scheduler": "exp", "gamma": 0.5}, {"scheduler": "onecycle", "max_lr": 0.3}, None],
    ids=["cos", "exp", "onecycle", "none"],
)
def test_reduce_after_another_scheduler_begins_with_the_run_s_rate(before: Any, tmp_path: Path) -> None:
    train(trainer_with(before, save_path=str(tmp_path)), 2)
    assert train(trainer_with(_NEVER, resume=str(tmp_path)), 4) == [0.1] * 2 * STEPS
    assert train(trainer_with(_NEVER, lr=0.2, resume=str(tmp_path)), 4) == [0.2] * 2 * STEPS


def test_reduce_takes_more_for_better() -> None:
    always: dict[str, Any] = {"factor": 0.5, "patience": 0, "threshold": 0.5, "threshold_mode": "abs"}
    run = Run({"scheduler": "reduce", **always})
    assert run.schedule.scheduler.mode == "max"
    for improvement in (1.0, 2.0, 3.0, 3.0):
        run.schedule.after_epoch(improvement)
    assert run.optimizer.param_groups[0]["lr"] == 0.05
    wanted = "of mode 'min', but is told the improvement over the tasks, of which more is better: give mode='max'"
    with pytest.raises(UsageError, match=wanted):
        trainer_with({"scheduler": "ReduceLROnPlateau", "mode": "min"})
    with pytest.raises(UsageError, match=wanted):
        trainer_with(scheduler=lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1))
    trainer = trainer_with()
    with pytest.raises(UsageError, match=wanted):
        trainer.scheduler = lr_scheduler.ReduceLROnPlateau(trainer.optimizer)


@pytest.mark.parametrize(
    ("scheduler_param", "rates"),
    [
        ({"scheduler": "MultiplicativeLR", "lr_lambda": lambda epoch: 1.0}, [0.1, 0.1, 0.1]),
        ({"scheduler": "MultiplicativeLR", "lr_lambda": lambda epoch: 0.5}, [0.1, 0.05, 0.025]),
        ({"scheduler": "exp", "gamma": 0.5}, [0.1, 0.05, 0.025]),
    ],
    ids=["constant", "halves", "closed form"],
)
@pytest.mark.parametrize("warmup", [1, 2])
def test_after_a_warm_up_the_rates_are_whole(scheduler_param: Any, rates: list[float], warmup: int) -> None:
    ramp = [0.1 * (index + 1) / (warmup + 1) for index in range(warmup)]
    found = Run({**scheduler_param, "warmup": warmup})(3 + warmup)
    assert found == pytest.approx(by_epoch(ramp + rates))


def test_lengths_left_open_and_numbers_as_text() -> None:
    assert Run({"scheduler": "cos", "T_max": None})(4) == Run({"scheduler": "cos"})(4)
    assert Run({"scheduler": "step", "step_size": "2", "gamma": "5e-1"})(4) == pytest.approx(
        by_epoch([0.1, 0.1, 0.05, 0.05])
    )
    with pytest.raises(UsageError, match="step_size of scheduler_param must be at least 1, got 'two'"):
        Run({"scheduler": "step", "step_size": "two"})
    with pytest.raises(UsageError, match="one of its phases has no length in a run of 10, in steps or epochs"):
        Run({"scheduler": "onecycle", "pct_start": 0.1, "per": "epoch"})(10)


class Bounded(SGD):
    """Has bounds of its rate among its settings, as optimizers of other packages do."""

    def __init__(self, params: Any, lr: float, min_lr: float = 0.01, max_lr: float = 1.0) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(min_lr=min_lr, max_lr=max_lr)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert all(group["min_lr"] <= group["lr"] <= group["max_lr"] for group in self.param_groups)
        super().step()


def test_an_optimizer_keeps_bounds_of_its_own(tmp_path: Path) -> None:
    first = trainer_with({"scheduler": "cos"}, optim={"optim": Bounded}, save_path=str(tmp_path))
    train_only(first, 1)
    options = {"optim": {"optim": Bounded, "lr": 0.2, "min_lr": 0.001}, "resume": str(tmp_path)}
    second = trainer_with({"scheduler": "exp", "gamma": 0.5}, **options)
    train_only(second, 2)
    assert [second.optimizer.param_groups[0][name] for name in ("lr", "min_lr", "max_lr")] == [0.05, 0.001, 1.0]


def train_only(trainer: Any, epochs: int) -> None:
    trainer.train(loaders(), loaders(rows=8), epochs)


def test_groups_added_later_are_refused_with_a_scheduler() -> None:
    for scheduler in ({"scheduler": "onecycle"}, {"scheduler": "exp", "gamma": 0.5}):
        run = Run(scheduler)
        run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
        with pytest.raises(UsageError, match="has got other groups since its scheduler was made"):
            run(2)


def test_a_longer_run_of_a_stored_cycle_says_what_to_change() -> None:
    first, second = Run({"scheduler": "onecycle"}), Run({"scheduler": "onecycle"}, resumed="stored")
    first(2)
    second.go_on_from(first)
    with pytest.raises(UsageError, match="has 6 steps, total_steps, and the run 12: it is the checkpoint's, by"):
        second(4, 2)


def test_a_cycle_in_a_sequence_goes_by_steps() -> None:
    def sequence(optimizer: Any) -> Any:
        parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.OneCycleLR(optimizer, 0.3, 10)]
        return lr_scheduler.SequentialLR(optimizer, parts, [2])

    assert Run({"scheduler": sequence}).schedule.per == "step"
