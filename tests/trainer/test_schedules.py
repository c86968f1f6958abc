"""Learning rates: by step and by epoch, as long as the run, and, resumed, those of an undisturbed run."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from fastmtl.errors import CheckpointError, UsageError
from fastmtl.trainer.checkpoint.files import read_checkpoint, save_atomically
from fastmtl.trainer.checkpoint.resume import _load_optimizer, _optimizer_state
from fastmtl.trainer.optim.schedule import Place, make_schedule
from tests.trainer.test_resume import InterruptAt
from tests.trainer.toy import flat, loaders, make_trainer

STEPS = 3


def _named(value: object) -> str:
    """Return a name for a case that is the same in all processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:60]


class Recorder(SGD):
    """Notes the settings that each step is made with."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.seen: list[list[tuple[float, float]]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append([(group["lr"], group["momentum"]) for group in self.param_groups])
        super().step()


def trainer_with(scheduler_param: Any = None, lr: float = 0.1, **options: Any) -> Any:
    optim = {"optim": Recorder, "lr": lr, **options.pop("optim", {})}
    # Rates that are easy to read would be too large for the gradients.
    options = {"log_every": 1, "clip_grad_norm": 1e-3} | options
    return make_trainer("EW", optim_param=optim, scheduler_param=scheduler_param, **options)


def rates(trainer: Any, group: int = 0) -> list[float]:
    return [step[group][0] for step in trainer.optimizer.seen]


def train(trainer: Any, epochs: int) -> list[float]:
    trainer.train(loaders(), loaders(rows=8), epochs)
    return rates(trainer)


def by_epoch(values: list[float]) -> list[float]:
    return [value for value in values for _ in range(STEPS)]


def test_one_cycle_is_stepped_by_steps_and_as_long_as_the_run() -> None:
    trainer = trainer_with({"scheduler": "onecycle", "max_lr": 0.5})
    assert trainer.scheduler is None
    found = train(trainer, 4)
    reference = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    scheduler, expected = lr_scheduler.OneCycleLR(reference, 0.5, total_steps=4 * STEPS), []
    for _ in range(4 * STEPS):
        expected.append((reference.param_groups[0]["lr"], reference.param_groups[0]["momentum"]))
        reference.step()
        scheduler.step()
    assert [step[0] for step in trainer.optimizer.seen] == expected
    assert max(found) == pytest.approx(0.5, rel=0.05)


def test_one_cycle_peaks_at_the_optimizer_s_rates() -> None:
    groups = {"optim": {"params": {"decoders": {"lr": 0.02}}}}
    trainer = trainer_with({"scheduler": "OneCycleLR", "pct_start": 0.5}, lr=0.2, **groups)
    train(trainer, 2)
    assert max(rates(trainer)) <= 0.2
    assert max(rates(trainer)) == pytest.approx(10 * max(rates(trainer, 1)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_counted_as_they_are_taken(accumulate: int) -> None:
    trainer = trainer_with({"scheduler": "poly", "per": "step"}, accumulate=accumulate)
    steps = 2 * math.ceil(STEPS / accumulate)
    found = train(trainer, 2)
    assert found == pytest.approx([0.1 * (1 - index / steps) for index in range(steps)])


def test_linear_warm_up() -> None:
    assert train(trainer_with({"scheduler": "warmup", "warmup": 4}), 6) == pytest.approx(
        by_epoch([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    )
    found = train(trainer_with({"scheduler": "warmup", "warmup": 4, "per": "step"}), 2)
    assert found == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


@pytest.mark.parametrize("per", ["epoch", "step"])
def test_cosine_with_warm_up(per: str) -> None:
    found = train(trainer_with({"scheduler": "cos", "warmup": 2, "per": per}), 6)
    total = 6 if per == "epoch" else 6 * STEPS
    cosine = [0.1 * (1 + math.cos(math.pi * index / (total - 2))) / 2 for index in range(total - 2)]
    expected = [0.1 / 3, 0.2 / 3, *cosine]
    assert found == pytest.approx(by_epoch(expected) if per == "epoch" else expected)


@pytest.mark.parametrize(
    ("scheduler_param", "expected"),
    [
        ({"scheduler": "MultiStepLR", "milestones": [1, 3], "gamma": 0.1}, [0.1, 0.01, 0.01, 0.001]),
        ({"scheduler": "multisteplr", "milestones": [1, 3], "gamma": 0.1}, [0.1, 0.01, 0.01, 0.001]),
        ({"scheduler": "LinearLR", "start_factor": 0.5, "total_iters": 2}, [0.05, 0.075, 0.1, 0.1]),
        ({"scheduler": "LambdaLR", "lr_lambda": lambda epoch: 1 / (1 + epoch)}, [0.1, 0.05, 0.1 / 3, 0.025]),
        ({"scheduler": lr_scheduler.StepLR, "step_size": 2, "gamma": 0.5}, [0.1, 0.1, 0.05, 0.05]),
        ({"scheduler": "CosineAnnealingLR"}, [0.1 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]),
    ],
)
def test_any_name_or_class_of_torch(scheduler_param: dict[str, Any], expected: list[float]) -> None:
    assert train(trainer_with(scheduler_param), 4) == pytest.approx(by_epoch(expected))


def test_functions_make_schedulers() -> None:
    trainer = trainer_with(scheduler=lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5))
    assert train(trainer, 3) == pytest.approx(by_epoch([0.1, 0.05, 0.025]))

    def linear(optimizer: Any, num_warmup_steps: int, num_training_steps: int) -> Any:
        return lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (1 + step) / num_warmup_steps) / num_training_steps
        )

    trainer = trainer_with({"scheduler": linear, "num_warmup_steps": 4})
    assert train(trainer, 2) == pytest.approx([0.1 * share / 6 for share in (0.25, 0.5, 0.75, 1, 1, 1)])
    trainer = trainer_with(
        scheduler=lambda optimizer, total_steps: lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps)
    )
    assert len(train(trainer, 2)) == 6


def test_a_scheduler_may_be_put_in_its_place() -> None:
    trainer = trainer_with()
    trainer.scheduler = lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    assert train(trainer, 3) == pytest.approx(by_epoch([0.1, 0.05, 0.025]))
    trainer.scheduler = None
    assert trainer.scheduler is None


def test_reduce_goes_by_the_improvement() -> None:
    trainer = trainer_with(
        {"scheduler": "reduce", "mode": "max", "factor": 0.5, "patience": 0, "threshold": 1e9, "threshold_mode": "abs"}
    )
    assert train(trainer, 4) == pytest.approx(by_epoch([0.1, 0.1, 0.05, 0.025]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler_param": {"scheduler": "cosin"}}, "Unknown scheduler 'cosin'"),
        ({"scheduler_param": {"scheduler": "SequentialLR"}}, "SequentialLR is made of schedulers of the optimizer"),
        ({"scheduler_param": {"scheduler": 3}}, "scheduler must be one of"),
        ({"scheduler_param": {"scheduler": "cos", "per": "batch"}}, "Unknown per of scheduler_param 'batch'"),
        ({"scheduler_param": {"scheduler": "cos", "warmup": -1}}, "warmup of scheduler_param must be a whole number"),
        ({"scheduler_param": {"scheduler": "warmup"}}, "needs warmup"),
        ({"scheduler_param": {"scheduler": "reduce", "warmup": 2}}, "ReduceLROnPlateau cannot have a warmup"),
        ({"scheduler_param": {"scheduler": "reduce", "per": "step"}}, "per must be 'epoch' for ReduceLROnPlateau"),
        ({"scheduler_param": {"scheduler": "exp"}}, r"ExponentialLR\(\), cannot be used: .*gamma"),
        ({"scheduler_param": {"scheduler": "exp", "gamma": 0.5, "speed": 1}}, "cannot be used: .*speed"),
        ({"scheduler_param": {"scheduler": "cos", "T_max": 0}}, "T_max of scheduler_param must be at least 1"),
        ({"scheduler": "cos"}, "scheduler must be a function of the optimizer"),
        ({"scheduler": lambda optimizer: 3}, "must give a scheduler with a method step, got a int"),
        (
            {
                "scheduler": lambda optimizer: lr_scheduler.ExponentialLR(
                    Recorder([torch.nn.Parameter(torch.ones(1))]), 0.5
                )
            },
            "gives a scheduler of another optimizer",
        ),
        (
            {"scheduler_param": {"scheduler": "exp", "gamma": 1}, "scheduler": lambda optimizer: None},
            "scheduler and scheduler_param say the same",
        ),
        ({"resume_schedule": "old"}, "Unknown resume_schedule 'old'"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer_with(**options)


def test_a_scheduler_that_needs_more_is_refused() -> None:
    class Timm:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def step(self, epoch: int) -> None:
            pass

    with pytest.raises(UsageError, match="step of Timm needs epoch, and is called without"):
        trainer_with(scheduler=Timm)


def test_a_schedule_shorter_than_the_run_is_refused_beforehand() -> None:
    trainer = trainer_with({"scheduler": "onecycle", "max_lr": 0.5, "total_steps": 5})
    with pytest.raises(UsageError, match="OneCycleLR has 5 steps, total_steps, and the run 6"):
        train(trainer, 2)
    assert rates(trainer) == []
    with pytest.raises(UsageError, match="warmup of scheduler_param must be shorter than the run, 2, got 2"):
        train(trainer_with({"scheduler": "cos", "warmup": 2}), 2)


def test_a_further_run_has_a_schedule_of_its_own() -> None:
    trainer = trainer_with({"scheduler": "onecycle"})
    once = train(trainer, 2)
    assert train(trainer, 2) == [*once, *once]


def _user(optimizer: Any, gamma: float = 0.5) -> Any:
    return UserScheduler(optimizer, gamma)


class UserScheduler:
    """Of nobody's base class."""

    def __init__(self, optimizer: Any, gamma: float) -> None:
        self.optimizer, self.gamma, self.helper = optimizer, gamma, object()

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= self.gamma


def _sequence(optimizer: Any) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, [2])


def _chained(optimizer: Any) -> Any:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


# What a short run has, and what the longer one has in its place.
SCHEDULES: list[tuple[Any, Any]] = [
    (None, None),
    ({"scheduler": "exp", "gamma": 0.9}, {"scheduler": "exp", "gamma": 0.9}),
    ({"scheduler": "exp", "gamma": 0.9}, {"scheduler": "exp", "gamma": 0.8}),
    ({"scheduler": "step", "step_size": 2, "gamma": 0.5}, {"scheduler": "step", "step_size": 3, "gamma": 0.2}),
    ({"scheduler": "cos", "T_max": 2}, {"scheduler": "cos", "T_max": 5}),
    ({"scheduler": "cos"}, {"scheduler": "cos"}),
    ({"scheduler": "cos", "per": "step"}, {"scheduler": "cos", "per": "step"}),
    ({"scheduler": "cos", "warmup": 1}, {"scheduler": "cos", "warmup": 1}),
    ({"scheduler": "exp", "gamma": 0.9, "warmup": 3}, {"scheduler": "exp", "gamma": 0.9, "warmup": 3}),
    ({"scheduler": "onecycle"}, {"scheduler": "onecycle"}),
    ({"scheduler": "onecycle", "max_lr": 0.3}, {"scheduler": "onecycle", "max_lr": 0.4}),
    ({"scheduler": "poly", "power": 0.9}, {"scheduler": "poly", "power": 0.9}),
    ({"scheduler": "MultiStepLR", "milestones": [1, 3]}, {"scheduler": "MultiStepLR", "milestones": [1, 4]}),
    (
        {"scheduler": "LambdaLR", "lr_lambda": lambda t: 0.9**t},
        {"scheduler": "LambdaLR", "lr_lambda": lambda t: 0.8**t},
    ),
    ({"scheduler": _user}, {"scheduler": _user}),
    ({"scheduler": _user}, {"scheduler": _user, "gamma": 0.7}),
    ({"scheduler": _sequence}, {"scheduler": _sequence}),
    ({"scheduler": _chained}, {"scheduler": _chained}),
    (None, {"scheduler": "cos"}),
    ({"scheduler": "cos"}, None),
    ({"scheduler": "exp", "gamma": 0.9}, {"scheduler": "step", "step_size": 1, "gamma": 0.5, "per": "step"}),
    ({"scheduler": "CyclicLR", "base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4},) * 2,
    ({"scheduler": "CosineAnnealingWarmRestarts", "T_0": 2}, {"scheduler": "CosineAnnealingWarmRestarts", "T_0": 3}),
]


class Run:
    """A run as the trainer makes it, without a network: its rates, and where it can be gone on with."""

    def __init__(self, scheduler_param: Any, resumed: str = "new") -> None:
        self.optimizer = Recorder([torch.nn.Parameter(torch.ones(1))])
        self.schedule = make_schedule(self.optimizer, scheduler_param, resumed=resumed, tell=lambda _: None)

    def __call__(
        self, epochs: int, epoch: int = 0, batch: int = 0, until: tuple[int, int] | None = None
    ) -> list[float]:
        self.schedule.begin(Place(epochs, STEPS, epoch, batch))
        for index in range(epoch, epochs):
            for step in range(batch if index == epoch else 0, STEPS):
                if (index, step) == until:
                    break
                self.optimizer.step()
                self.schedule.after_step()
            else:
                self.schedule.after_epoch(0.0)
                continue
            break
        return [step[0][0] for step in self.optimizer.seen]

    def go_on_from(self, other: Run) -> None:
        state = copy.deepcopy(other.schedule.state_dict())
        _load_optimizer(self.optimizer, copy.deepcopy(_optimizer_state(other.optimizer)), Path())
        self.schedule.load_state_dict(state)


@pytest.mark.parametrize(("before", "after"), SCHEDULES, ids=_named)
@pytest.mark.parametrize(("epoch", "batch"), [(2, 0), (1, 2)])
def test_a_longer_run_goes_on_with_the_rates_of_an_undisturbed_one(
    before: Any, after: Any, epoch: int, batch: int
) -> None:
    undisturbed = Run(after)(5)
    first, second = Run(before), Run(after)
    assert len(first(2, until=(epoch, batch))) == epoch * STEPS + batch
    second.go_on_from(first)
    assert second(5, epoch, batch) == undisturbed[epoch * STEPS + batch :]


@pytest.mark.parametrize("scheduler_param", [None, {"scheduler": "cos"}, {"scheduler": "onecycle"}], ids=str)
def test_a_longer_run_of_a_trainer_goes_on_with_the_rates_of_an_undisturbed_one(
    scheduler_param: Any, tmp_path: Path
) -> None:
    undisturbed = train(trainer_with(scheduler_param), 3)
    train(trainer_with(scheduler_param, save_path=str(tmp_path)), 2)
    assert train(trainer_with(scheduler_param, resume=str(tmp_path)), 3) == undisturbed[2 * STEPS :]


@pytest.mark.parametrize(
    "scheduler_param",
    [{"scheduler": "cos", "per": "step"}, {"scheduler": "onecycle"}, {"scheduler": _sequence}, {"scheduler": _user}],
    ids=_named,
)
def test_unchanged_runs_go_on_to_the_last_bit(scheduler_param: Any, tmp_path: Path) -> None:
    whole = trainer_with(scheduler_param)
    undisturbed = train(whole, 3)
    first = trainer_with(scheduler_param, save_path=str(tmp_path), logger=InterruptAt(4))
    with pytest.raises(KeyboardInterrupt):
        train(first, 3)
    second = trainer_with(scheduler_param, resume=str(tmp_path))
    assert train(second, 3) == undisturbed[5:]
    assert torch.equal(flat(second.model.parameters()), flat(whole.model.parameters()))


def test_groups_go_on_with_their_own_rates(tmp_path: Path) -> None:
    groups = {"optim": {"params": {"decoders": {"lr": 0.02}, "encoder.stages.0": {"lr": 0.5}}}}
    undisturbed = trainer_with({"scheduler": "cos"}, **groups)
    train(undisturbed, 4)
    groups = {"optim": {"params": {"decoders": {"lr": 0.02}, "encoder.stages.0": {"lr": 0.5}}}}
    train(trainer_with({"scheduler": "cos"}, save_path=str(tmp_path), **groups), 2)
    groups = {"optim": {"params": {"decoders": {"lr": 0.02}, "encoder.stages.0": {"lr": 0.5}}}}
    second = trainer_with({"scheduler": "cos"}, resume=str(tmp_path), **groups)
    train(second, 4)
    assert second.optimizer.seen == undisturbed.optimizer.seen[2 * STEPS :]


@pytest.mark.parametrize("scheduler_param", [None, {"scheduler": "exp", "gamma": 0.9}, {"scheduler": "onecycle"}])
def test_another_rate_is_that_of_a_run_that_had_it(
    scheduler_param: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = train(trainer_with(scheduler_param, lr=0.03), 4)
    train(trainer_with(scheduler_param, save_path=str(tmp_path)), 2)
    capsys.readouterr()
    second = trainer_with(scheduler_param, lr=0.03, resume=str(tmp_path))
    assert train(second, 4) == undisturbed[2 * STEPS :]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume: ")]
    assert len(told) == 1
    assert "lr 0.03 in place of 0.1" in told[0]
    assert "with resume_schedule='stored' they stay the checkpoint's." in told[0]


@pytest.mark.parametrize("scheduler_param", [None, {"scheduler": "exp", "gamma": 0.9}])
def test_the_checkpoint_s_rates_are_kept_if_asked_for(
    scheduler_param: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = train(trainer_with(scheduler_param), 4)
    train(trainer_with(scheduler_param, save_path=str(tmp_path)), 2)
    after = scheduler_param and {"scheduler": "exp", "gamma": 0.5}
    second = trainer_with(after, lr=0.03, resume=str(tmp_path), resume_schedule="stored")
    assert train(second, 4) == undisturbed[2 * STEPS :]
    assert "whose are kept; with resume_schedule='new' the run's are taken." in capsys.readouterr().out
    with pytest.raises(UsageError, match="goes on with the checkpoint's scheduler"):
        trainer_with({"scheduler": "step", "step_size": 1}, resume=str(tmp_path), resume_schedule="stored")


def test_other_settings_of_the_optimizer_are_this_run_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(trainer_with({"scheduler": "exp", "gamma": 0.9}, save_path=str(tmp_path)), 2)
    settings = {"weight_decay": 0.5, "momentum": 0.3}
    second = trainer_with({"scheduler": "exp", "gamma": 0.9}, resume=str(tmp_path), optim=settings)
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert "weight_decay 0.5 in place of 0.0" in capsys.readouterr().out
    train(second, 3)
    assert second.optimizer.seen[0][0] == (pytest.approx(0.081), 0.3)
    stored = trainer_with(
        {"scheduler": "exp", "gamma": 0.9}, resume=str(tmp_path), optim=settings, resume_schedule="stored"
    )
    assert stored.optimizer.param_groups[0]["weight_decay"] == 0.0


def test_an_unchanged_run_says_nothing_and_keeps_what_was_changed_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = trainer_with({"scheduler": "exp", "gamma": 0.5}, save_path=str(tmp_path))
    first.optimizer.param_groups[0]["lr"] = 0.4
    assert train(first, 2) == by_epoch([0.4, 0.2])
    capsys.readouterr()
    second = trainer_with({"scheduler": "exp", "gamma": 0.5}, resume=str(tmp_path))
    assert train(second, 3) == by_epoch([0.1])
    assert "resume:" not in capsys.readouterr().out


def test_reduce_keeps_its_reductions(tmp_path: Path) -> None:
    def reduce(factor: float, patience: int = 0) -> dict[str, Any]:
        return {
            "scheduler": "reduce",
            "mode": "max",
            "factor": factor,
            "patience": patience,
            "threshold": 1e9,
            "threshold_mode": "abs",
        }

    undisturbed = train(trainer_with(reduce(0.5)), 5)
    train(trainer_with(reduce(0.5), save_path=str(tmp_path)), 3)
    assert train(trainer_with(reduce(0.5), resume=str(tmp_path)), 5) == undisturbed[3 * STEPS :]
    # Two reductions so far, from a rate of its own; further ones are by the new factor.
    second = trainer_with(reduce(0.1), lr=0.2, resume=str(tmp_path))
    assert train(second, 5) == pytest.approx(by_epoch([0.05, 0.005]))


def test_checkpoints_of_older_versions_follow_the_new_schedule(tmp_path: Path) -> None:
    undisturbed = train(trainer_with({"scheduler": "cos", "T_max": 5}), 5)
    train(trainer_with({"scheduler": "cos", "T_max": 2}, save_path=str(tmp_path)), 2)
    state: Any = read_checkpoint(tmp_path / "last.pt", torch.device("cpu"))
    del state["schedule"]
    save_atomically(state, tmp_path / "last.pt")
    assert train(trainer_with({"scheduler": "cos", "T_max": 5}, resume=str(tmp_path)), 5) == undisturbed[2 * STEPS :]
    assert train(trainer_with({"scheduler": "cos"}, resume=str(tmp_path)), 5) == undisturbed[2 * STEPS :]


def test_steps_of_another_number_in_an_epoch_are_those_of_this_run(tmp_path: Path) -> None:
    def data(batch: int) -> Any:
        return loaders(batch=batch)

    undisturbed = trainer_with({"scheduler": "onecycle"})
    undisturbed.train(data(4), loaders(rows=8), 4)
    first = trainer_with({"scheduler": "onecycle"}, save_path=str(tmp_path))
    first.train(data(8), loaders(rows=8), 2)
    second = trainer_with({"scheduler": "onecycle"}, resume=str(tmp_path))
    second.train(data(4), loaders(rows=8), 4)
    assert rates(second) == rates(undisturbed)[12:]


def test_other_groups_cannot_be_gone_on_with(tmp_path: Path) -> None:
    train(trainer_with(save_path=str(tmp_path)), 1)
    with pytest.raises(CheckpointError, match="other groups of the optimizer than this run: groups cannot change"):
        trainer_with(resume=str(tmp_path), optim={"params": {"decoders": {"lr": 0.1}}})


def test_groups_of_as_many_parameters_are_not_taken_for_each_other(tmp_path: Path) -> None:
    train(trainer_with(save_path=str(tmp_path), optim={"params": {"decoders": {"lr": 0.1}}}), 1)
    with pytest.raises(CheckpointError, match="other groups of the optimizer than this run: groups cannot change"):
        trainer_with(resume=str(tmp_path), optim={"params": {"encoder": {"lr": 0.1}}})


def test_nothing_left_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(trainer_with({"scheduler": "onecycle"}, save_path=str(tmp_path)), 2)
    assert train(trainer_with({"scheduler": "onecycle"}, resume=str(tmp_path)), 1) == []
    assert "Nothing is left to train" in capsys.readouterr().out


@pytest.mark.parametrize("weighting", ["MGDA", "UW"])
def test_float16_and_rates_of_steps(weighting: str) -> None:
    trainer = make_trainer(
        weighting, optim_param={"optim": "rmsprop", "lr": 0.01}, scheduler_param={"scheduler": "poly", "per": "step"},
        precision="fp16",
    )  # fmt: skip
    trainer.train(loaders(), loaders(rows=8), 2)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
