"""The trainer as a user meets it: constructor, log lines, errors."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastmtl import Trainer
from fastmtl.errors import BackendError, CheckpointError, NonFiniteError, UsageError
from fastmtl.loss import CELoss, MSELoss
from fastmtl.metrics import AccMetric
from fastmtl.trainer.log.logger import Logger, RunInfo, StepRecords
from tests.trainer.toy import encoder, flat, loaders, make_trainer, task_dict


class Recorder(Logger):
    """Keeps every call."""

    def __init__(self) -> None:
        self.info: RunInfo | None = None
        self.steps: list[StepRecords] = []
        self.epochs: list[tuple[int, str]] = []
        self.checkpoints: list[str] = []
        self.ended = 0

    def on_start(self, info: RunInfo) -> None:
        self.info = info

    def on_steps(self, records: StepRecords) -> None:
        self.steps.append(records)

    def on_epoch(self, epoch: int, mode: str, losses: Any, metrics: Any, seconds: float) -> None:
        self.epochs.append((epoch, mode))

    def on_checkpoint(self, path: Any, kind: str) -> None:
        self.checkpoints.append(kind)

    def on_end(self, best_epoch: int, best_result: Any) -> None:
        self.ended += 1


def test_log_lines_are_those_of_libmtl(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer()
    trainer.train(loaders(), loaders(seed=1), 2, val_dataloaders=loaders(seed=2))
    lines = capsys.readouterr().out.splitlines()
    assert "LOG FORMAT | task0_LOSS Acc | task1_LOSS L1 | TIME" in lines
    number = r"-?\d+\.\d{4}"
    scores = rf"{number} {number} \| {number} {number} \| Time: {number}"
    epochs = [line for line in lines if line.startswith("Epoch:")]
    assert len(epochs) == 2
    assert re.fullmatch(rf"Epoch: 0001 \| TRAIN: {scores} \| VAL: {scores} \| TEST: {scores}", epochs[1])
    assert any(line.startswith("Best Result: Epoch ") for line in lines)
    assert any(line.startswith("Total Params: ") for line in lines)


@pytest.mark.parametrize("multi_input", [False, True])
@pytest.mark.parametrize("weighting", ["ew", "mgda"])
def test_training_lowers_the_losses(weighting: str, multi_input: bool) -> None:
    trainer = make_trainer(weighting, multi_input=multi_input, optim_param={"optim": "adam", "lr": 1e-2})
    trainer.train(loaders(multi_input=multi_input, rows=96), loaders(multi_input=multi_input, rows=96), 15)
    history = trainer.model.train_loss_buffer
    assert (history[:, -1] < 0.7 * history[:, 0]).all()


def test_loggers_see_every_step_once() -> None:
    recorder = Recorder()
    trainer = make_trainer(logger=recorder, log_every=2)
    weights = trainer.train(loaders(), loaders(), 2, return_weight=True)
    assert recorder.info is not None
    assert recorder.info.batches_per_epoch == 3
    assert [(r.first_step, r.count, r.epoch) for r in recorder.steps] == [(0, 2, 0), (2, 1, 0), (3, 2, 1), (5, 1, 1)]
    assert recorder.epochs == [(0, "train"), (0, "test"), (1, "train"), (1, "test")]
    assert recorder.ended == 1
    seen = np.concatenate([r.weights for r in recorder.steps if r.weights is not None])
    np.testing.assert_array_equal(weights.transpose(1, 2, 0).reshape(6, 2), seen)
    np.testing.assert_allclose(weights.sum(0), 1)
    assert all(r.gram is not None and r.gram.shape[1:] == (2, 2) for r in recorder.steps)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"scheduler": "step", "step_size": 1, "gamma": 0.1},
        {"scheduler": "exp", "gamma": 0.1},
        {"scheduler": "cos", "T_max": 2},
        {"scheduler": "reduce", "mode": "max", "patience": 0, "factor": 0.1, "threshold": 1e9, "threshold_mode": "abs"},
    ],
    ids=lambda each: each["scheduler"],
)
def test_schedulers(scheduler: dict[str, Any]) -> None:
    trainer = make_trainer(scheduler_param=scheduler)
    trainer.train(loaders(), loaders(), 2)
    assert trainer.optimizer.param_groups[0]["lr"] < 0.05


def test_process_preds_is_called() -> None:
    class Negated(Trainer):
        def process_preds(self, preds: Any, task_name: str | None = None) -> Any:
            return {task: -pred for task, pred in preds.items()}

    plain = make_trainer("EW")
    negated = Negated(
        task_dict(),
        "EW",
        "HPS",
        lambda: plain.model.encoder,
        plain.model.decoders,
        False,
        False,
        {"optim": "sgd", "lr": 0.1},
        None,
        device="cpu",
    )
    negated.test(loaders())
    plain.test(loaders())
    assert negated.meter.results["task0"] != plain.meter.results["task0"]


def test_names_in_any_case_and_classes() -> None:
    assert make_trainer("mgda", "hps", weight_args={"MGDA_gn": "Loss+"}).kwargs["weight_args"] == {"mgda_gn": "loss+"}
    from fastmtl.architecture import MTAN
    from fastmtl.weighting import EW

    assert make_trainer("mgda", "mtan").architecture == "MTAN"
    assert make_trainer(EW, MTAN).weighting == "EW"
    with pytest.raises(UsageError, match=r"Unknown weighting 'mgad'\. Did you mean 'MGDA'\?"):
        make_trainer("mgad")
    with pytest.raises(UsageError, match=r"Unknown architecture 'MTN'\. Did you mean 'MTAN'\?"):
        make_trainer("EW", "MTN")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoders": nn.ModuleDict({"task0": nn.Linear(8, 3)})}, "no module for the task 'task1'"),
        ({"optim_param": {"optim": "sdg", "lr": 1.0}}, "Did you mean 'sgd'"),
        ({"optim_param": {"lr": 1.0}}, "must name the optim"),
        ({"optim_param": {"optim": "sgd", "lr": -1.0}}, "Invalid learning rate"),
        ({"optim_param": {"optim": "sgd", "speed": 1.0}}, "speed"),
        ({"scheduler_param": {"scheduler": "stop"}}, "Unknown scheduler 'stop'"),
        ({"scheduler_param": {"scheduler": "step", "step": 3}}, "scheduler_param"),
        ({"weight_args": {"mgda_gn": "l3"}}, "must be one of none, l2, loss, loss"),
        ({"weight_args": {"mgda_g": "l2"}}, "Did you mean 'mgda_gn'"),
        ({"weighting": "CAGrad", "weight_args": {"calpha": -1.0}}, "calpha of CAGrad must be at least 0.0, got -1.0"),
        ({"weighting": "GradNorm", "weight_args": {"alpha": math.nan}}, "alpha of GradNorm must be a number, got nan"),
        ({"optim_param": None}, "must name the optim"),
        ({"scheduler_param": {"scheduler": "step", "step_size": 0}}, "step_size of scheduler_param must be at least 1"),
        ({"scheduler_param": {"scheduler": "cos", "T_max": 0}}, "T_max of scheduler_param must be at least 1"),
        ({"device": "gpu"}, "device must be cpu, cuda"),
        ({"device": "meta"}, "device must be cpu, cuda"),
        ({"compile": "maybe"}, "compile must be true, false or auto, got 'maybe'"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"limit_batches": 0}, "limit_batches must be at least 1, got 0"),
        *(
            ({name: count}, f"{name} must be a whole number, got ")
            for name in ("accumulate", "update_weights_every", "log_every")
            for count in (2.5, "2", True)
        ),
        ({"update_weights_every": 0}, "update_weights_every must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"log_every": None}, "log_every must be a whole number, got None"),
        ({"checkpoint_every": 1.5}, "checkpoint_every must be a whole number, got 1.5"),
        ({"tasks_per_step": 0}, "tasks_per_step must be at least 1, got 0"),
        ({"tasks_per_step": 3}, "tasks_per_step must be at most 2, the number of tasks, got 3"),
        *(({"tasks_per_step": count}, "tasks_per_step must be a whole number, got") for count in (1.5, 2.0, "2", True)),
        *(({"weight_momentum": decay}, "weight_momentum must be a number, got") for decay in (math.nan, "0.5", None)),
        ({"weight_momentum": 1.0}, "weight_momentum must be below 1, got 1.0"),
        (
            {"vjps": None},
            "vjps must be one of auto, sequential, batched, layerwise, compressed, blockwise, sketch, traced",
        ),
        ({"precision": None}, "precision must be one of fp32, bf16, fp16, got None"),
        ({"precision": torch.bfloat16}, "precision must be one of fp32, bf16, fp16, got torch.bfloat16"),
        ({"gram": 1}, "gram must be one of exact, local, got 1"),
        ({"cuda_graph": "no"}, "cuda_graph must be true, false or auto, got 'no'"),
        ({"cuda_graph": 1}, "cuda_graph must be true, false or auto, got 1"),
        ({"save_path": "/dev/null/folder"}, "save_path '/dev/null/folder' cannot be made: Not a directory"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_trainer(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_cuda() -> None:
    with pytest.raises(BackendError, match="finds no CUDA GPU here; use --device cpu"):
        make_trainer(device="cuda")


def test_mtan_needs_stages() -> None:
    with pytest.raises(UsageError, match=r"MTAN needs an encoder made of stages.*got Linear"):
        make_trainer("EW", "MTAN", encoder_class=lambda: nn.Linear(6, 8))


@pytest.mark.parametrize("epochs", [0, -1, 1.5, "2", True])
def test_epochs_that_cannot_be(epochs: Any) -> None:
    with pytest.raises(UsageError, match="epochs must be"):
        make_trainer().train(loaders(), loaders(), epochs)


@pytest.mark.parametrize("loader", [None, 3, iter([])])
@pytest.mark.parametrize("multi_input", [False, True])
def test_loaders_without_a_length(multi_input: bool, loader: Any) -> None:
    good = loaders(multi_input=multi_input)
    given = {**good, "task1": loader} if multi_input else loader
    with pytest.raises(UsageError, match="must be a loader of known length"):
        make_trainer(multi_input=multi_input).train(good, given, 1)


def test_labels_that_are_no_dictionary() -> None:
    with pytest.raises(UsageError, match="labels of a batch must be a dictionary by task, got Tensor"):
        make_trainer().train([(torch.zeros(4, 6), torch.zeros(4))], loaders(), 1)


def test_save_path_is_made(tmp_path: Path) -> None:
    make_trainer(save_path=str(tmp_path / "a" / "b")).train(loaders(), loaders(), 1)
    assert (tmp_path / "a" / "b" / "best.pt").exists()


def test_loaders_that_do_not_fit() -> None:
    trainer = make_trainer()
    x, labels = next(iter(loaders()))
    with pytest.raises(UsageError, match="train_dataloaders is empty"):
        trainer.train(loaders(rows=0), loaders(), 1)
    with pytest.raises(UsageError, match="test_dataloaders is empty"):
        trainer.train(loaders(), loaders(rows=0), 1)
    with pytest.raises(UsageError, match="must be one loader when multi_input is False"):
        trainer.train(loaders(multi_input=True), loaders(), 1)
    with pytest.raises(UsageError, match="no labels for the task 'task1'"):
        trainer.train([(x, {"task0": labels["task0"], "tusk1": labels["task1"]})], loaders(), 1)
    multi = make_trainer(multi_input=True)
    with pytest.raises(UsageError, match="dictionary of loaders"):
        multi.train(loaders(), loaders(), 1)
    with pytest.raises(UsageError, match="no loader for the task 'task1'"):
        multi.train(loaders(count=1, multi_input=True), loaders(multi_input=True), 1)


@pytest.mark.parametrize("optim", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("weighting", ["EW", "MGDA"])
def test_infinite_loss_is_reported_and_parameters_stay_finite(optim: str, weighting: str, tmp_path: Any) -> None:
    trainer = make_trainer(
        weighting, optim_param={"optim": optim, "lr": 1e-2}, save_path=str(tmp_path), log_every=10, limit_batches=5
    )
    data = loaders(rows=48, batch=8)
    trainer.train(data, loaders(), 1)
    saved = (tmp_path / "last.pt").read_bytes()
    data.dataset.labels["task1"][20] = float("inf")
    again = make_trainer(
        weighting, optim_param={"optim": optim, "lr": 1e-2}, save_path=str(tmp_path), log_every=10, limit_batches=5
    )
    with pytest.raises(NonFiniteError, match=r"loss of task1 became NaN or infinite in training step 2;.*last\.pt"):
        again.train(data, loaders(), 1)
    assert flat(again.model.parameters()).isfinite().all()
    assert (tmp_path / "last.pt").read_bytes() == saved


class _Steep(MSELoss):
    """A finite loss whose gradient is infinite."""

    def compute_loss(self, pred: torch.Tensor, gt: torch.Tensor) -> torch.Tensor:
        kept = pred * 1
        kept.register_hook(lambda grad: grad / 0)
        return super().compute_loss(kept, gt)


@pytest.mark.parametrize("weighting", ["MGDA", "UPGrad"])
def test_an_infinite_gradient_of_a_finite_loss_is_reported(weighting: str) -> None:
    tasks = task_dict()
    tasks["task1"]["loss_fn"] = _Steep()
    trainer = make_trainer(weighting, task_dict=tasks)
    before = flat(trainer.model.parameters())
    with pytest.raises(NonFiniteError, match=r"^The gradient of task1 became NaN or infinite in training step 0;"):
        trainer.train(loaders(), loaders(), 1)
    assert torch.equal(flat(trainer.model.parameters()), before)


def test_a_last_step_to_infinity_is_not_saved(tmp_path: Path) -> None:
    """No loss has seen the parameters yet that the last step of an epoch leaves."""
    options: dict[str, Any] = {"save_path": str(tmp_path), "optim_param": {"optim": "sgd", "lr": float("inf")}}
    with pytest.raises(NonFiniteError, match=r"parameters became NaN or infinite .* no checkpoint was written"):
        make_trainer("EW", limit_batches=1, **options).train(loaders(), loaders(), 1)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_another_model(tmp_path: Any) -> None:
    make_trainer(save_path=str(tmp_path)).train(loaders(), loaders(), 1)
    with pytest.raises(CheckpointError, match=r"best\.pt is of another model: .*task2.* is missing"):
        make_trainer(count=3, load_path=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"is of \['MGDA', 'HPS'"):
        make_trainer("EW", resume=str(tmp_path / "last.pt"))
    with pytest.raises(CheckpointError, match=r"is not a last\.pt"):
        make_trainer(resume=str(tmp_path / "best.pt"))
    with pytest.raises(CheckpointError, match=r"is a last\.pt, which a run goes on from"):
        make_trainer(load_path=str(tmp_path / "last.pt"))
    with pytest.raises(CheckpointError, match=r"is of the optimizer SGD, this run is of Adam\."):
        make_trainer(resume=str(tmp_path), optim_param={"optim": "adam", "lr": 1e-3})
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if key not in ("rng", "step")}, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match=r"is not whole: it has no step, rng\."):
        make_trainer(resume=str(tmp_path / "part.pt"))
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        make_trainer(load_path=str(tmp_path / "none.pt"))


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", bytes(5000), b"\x80\x02}q\x00.", pickle.dumps({"a": Path.cwd})], ids=repr
)
@pytest.mark.parametrize("argument", ["load_path", "resume"])
def test_files_that_are_no_checkpoints(argument: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"it is damaged|does not hold|is not a last"):
        make_trainer(**{argument: str(path)})


def test_torn_and_unreadable_checkpoints(tmp_path: Path) -> None:
    make_trainer(save_path=str(tmp_path)).train(loaders(), loaders(), 1)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "best.pt").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is not a checkpoint that can be read: it is damaged"):
        make_trainer(load_path=str(tmp_path / "torn.pt"))
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be read: Is a directory"):
        make_trainer(resume=str(tmp_path))


def test_a_list_of_one_loss_is_that_loss() -> None:
    tasks = task_dict()
    tasks["task0"]["loss_fn"] = [tasks["task0"]["loss_fn"]]
    trainer = make_trainer(task_dict=tasks)
    trainer.train(loaders(), loaders(rows=8), 1)
    assert math.isfinite(trainer.meter.loss_item[0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss_fn", "cross_entropy", "derived from fastmtl.loss.AbsLoss"),
        ("loss_fn", CELoss, "derived from fastmtl.loss.AbsLoss"),
        ("metrics_fn", [len, len], "update_fun and score_fun"),
        ("metrics_fn", AccMetric, "derived from fastmtl.metrics.AbsMetric"),
    ],
)
def test_losses_and_metrics_of_other_kinds_are_refused(key: str, value: Any, message: str) -> None:
    tasks = task_dict()
    tasks["task0"][key] = value
    with pytest.raises(UsageError, match=message):
        make_trainer(task_dict=tasks)


def _shared(**parts: Any) -> dict[str, dict[str, Any]]:
    """Two tasks of classification with the parts given in common."""
    return {
        task: {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1], **parts}
        for task in ("task0", "task1")
    }


def _results(tasks: dict[str, dict[str, Any]]) -> Any:
    torch.manual_seed(0)
    decoders = nn.ModuleDict({task: nn.Linear(8, 3) for task in tasks})
    trainer = make_trainer(task_dict=tasks, decoders=decoders)
    data = [(x, {"task0": labels["task0"], "task1": labels["task2"] * 0}) for x, labels in loaders(3)]
    trainer.train(data, data, 2)
    return trainer.meter.results, list(trainer.meter.loss_item), trainer.model.train_loss_buffer.tolist()


def test_one_loss_and_one_metric_for_several_tasks() -> None:
    assert _results(_shared(loss_fn=CELoss(), metrics_fn=AccMetric())) == _results(_shared())


class _Counting(AccMetric):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = iter(x for x in range(3))


def test_what_cannot_be_copied_for_another_task_is_refused() -> None:
    why = "it cannot be copied: cannot pickle 'generator' object"
    with pytest.raises(UsageError, match=rf"task_dict\['task1'\]\['metrics_fn'\] is the object of 'task0' too.*{why}"):
        make_trainer(task_dict=_shared(metrics_fn=_Counting()))


@pytest.mark.parametrize("scores", [0.5, torch.tensor(0.5), [], [0.5, 0.5]])
def test_scores_that_do_not_fit_the_metrics_are_refused(scores: Any) -> None:
    class Bad(AccMetric):
        def score_fun(self) -> Any:
            return scores

    tasks = task_dict()
    tasks["task0"]["metrics_fn"] = Bad()
    trainer = make_trainer(task_dict=tasks)
    with pytest.raises(UsageError, match="score_fun of Bad must return a list of one score per metric of 'task0', 1 "):
        trainer.test(loaders(rows=8))


@pytest.mark.parametrize("method", ["_process_data", "_compute_loss", "_prepare_dataloaders", "forward4loss"])
def test_methods_of_libmtl_trainer_that_are_not_called_are_refused(method: str) -> None:
    mine = type("Mine", (Trainer,), {method: lambda self, *args: None})
    with pytest.raises(UsageError, match=f"Mine has a method {method}, which fastmtl does not call: "):
        mine(task_dict(), "EW", "HPS", encoder, nn.ModuleDict(), False, False, {"optim": "sgd", "lr": 0.1}, None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("preccision", "Did you mean 'precision'"),
        ("weight_arg", "Did you mean 'weight_args'"),
        ("calpha", "Hyper-param"),
    ],
)
def test_arguments_that_nobody_reads_are_refused(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"Trainer has no argument '{name}'. {hint}"):
        make_trainer(**{name: 0.5})


def test_a_score_that_is_never_a_number_hides_no_best_epoch(tmp_path: Path) -> None:
    class Absent(AccMetric):
        def score_fun(self) -> list[float]:
            return [math.nan]

    tasks = task_dict()
    tasks["task0"]["metrics_fn"] = Absent()
    trainer = make_trainer(task_dict=tasks, save_path=str(tmp_path))
    trainer.train(loaders(), loaders(rows=8), 2)
    assert (tmp_path / "best.pt").is_file()
    assert math.isnan(trainer.meter.best_result["result"]["task0"][0])
