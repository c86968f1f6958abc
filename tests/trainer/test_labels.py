"""Missing labels: entries of a batch, and whole tasks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastmtl.engine.labels import labelled_entries, present_tasks
from fastmtl.loss import AbsLoss, CELoss, DepthLoss, KLDivLoss, L1Loss, MSELoss, NormalLoss, SegLoss
from fastmtl.metrics import AccMetric, DepthMetric, L1Metric, NormalMetric, SegMetric
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting import WEIGHTINGS, AbsWeighting, Weights
from tests.host_reads import NoHostRead
from tests.trainer.toy import flat, loaders, make_trainer

IMAGE = (4, 3, 5, 6)


def _cases() -> list[tuple[AbsLoss, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(IMAGE, generator=generator)
    classes = torch.randint(3, (4, 5, 6), generator=generator)
    return [
        (CELoss(), pred, classes),
        (CELoss(ignore_index=7), pred, classes),
        (CELoss(), pred, pred.flip(0).softmax(1)),
        (SegLoss(), pred, classes.float()),
        (MSELoss(), pred, pred.flip(0)),
        (L1Loss(), pred, pred.flip(0)),
        (KLDivLoss(), pred.log_softmax(1), pred.flip(0).softmax(1)),
        (DepthLoss(), pred[:, :1], pred.flip(0)[:, :1]),
        (NormalLoss(), pred, F.normalize(pred.flip(0), dim=1)),
    ]


def _without(loss: AbsLoss, labels: Tensor, rows: list[int]) -> Tensor:
    labels = labels.clone()
    missing = torch.nan if labels.is_floating_point() else loss.ignore_index
    assert missing is not None
    labels[rows] = missing
    return labels


@pytest.mark.parametrize(("loss", "pred", "labels"), _cases(), ids=lambda value: type(value).__name__)
class TestLosses:
    def test_average_over_the_rows_that_have_a_label(self, loss: AbsLoss, pred: Tensor, labels: Tensor) -> None:
        pred, some = pred.clone().requires_grad_(), _without(loss, labels, [1, 3])
        with NoHostRead():
            value = loss.compute_loss(pred, some)
            (grad,) = torch.autograd.grad(value, pred)
        expected = loss.compute_loss(pred[::2], labels[::2])
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, pred)[0])

    def test_no_label_at_all_gives_zero(self, loss: AbsLoss, pred: Tensor, labels: Tensor) -> None:
        pred = pred.clone().requires_grad_()
        value = loss.compute_loss(pred, _without(loss, labels, [0, 1, 2, 3]))
        assert value.item() == 0
        assert not torch.autograd.grad(value, pred)[0].any()

    def test_entries_are_counted(self, loss: AbsLoss, pred: Tensor, labels: Tensor) -> None:
        whole = labelled_entries(loss, labels)
        assert whole > 0
        assert labelled_entries(loss, _without(loss, labels, [2])) == whole * 3 / 4


@pytest.mark.parametrize(
    ("metric", "pred", "labels"),
    [
        (AccMetric(), torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2])),
        (L1Metric(), torch.arange(4.0)[:, None], torch.zeros(4, 1)),
        (SegMetric(3), *_cases()[3][1:]),
        (DepthMetric(), *_cases()[7][1:]),
        (NormalMetric(), *_cases()[8][1:]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_metrics_skip_missing_labels(metric: Any, pred: Tensor, labels: Tensor) -> None:
    some, none = _without(AbsLoss(), labels, [1, 3]), _without(AbsLoss(), labels, [0, 1, 2, 3])
    with NoHostRead():
        metric.update_fun(pred, some)
        metric.update_fun(pred, none)
    found = metric.score_fun()
    metric.reinit()
    metric.update_fun(pred[::2], labels[::2])
    assert found == pytest.approx(metric.score_fun(), rel=1e-6, nan_ok=True)


def _masked(labels: dict[str, Tensor], missing: dict[str, list[int]]) -> dict[str, Tensor]:
    return {task: _without(AbsLoss(), each, missing.get(task, [])) for task, each in labels.items()}


def test_partial_labels_train_as_the_subset_does() -> None:
    partial, subset = make_trainer("EW", count=2), make_trainer("EW", count=2)
    x, labels = next(iter(loaders(2)))
    for step in range(3):
        have = [row for row in range(len(x)) if row % 3 != step]
        lack = [row for row in range(len(x)) if row % 3 == step]
        everywhere = _masked(labels, {"task0": lack, "task1": lack})
        partial.step([(x, everywhere)], StepBuffer())
        subset.step([(x[have], {task: each[have] for task, each in labels.items()})], StepBuffer())
    torch.testing.assert_close(flat(partial.model.parameters()), flat(subset.model.parameters()))


OPTIMIZER = {"optim": "adam", "lr": 1e-2, "weight_decay": 0.1}


def _decoder(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, width))


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
@pytest.mark.parametrize("how", ["left out", "masked", "None"])
def test_absent_tasks_keep_their_state(name: str, how: str) -> None:
    decoders = nn.ModuleDict({f"task{t}": _decoder(1 if t % 2 else 3) for t in range(4)})
    trainer = make_trainer(
        name, count=4, rep_grad=WEIGHTINGS[name].needs == "reps", optim_param=OPTIMIZER, decoders=decoders
    )
    model = trainer.model
    model.epoch, model.epochs = 1, 2
    x, labels = next(iter(loaders(4)))
    batches = [(x, labels)] * trainer.step.batches
    trainer.step(batches, StepBuffer())
    if how == "left out":
        fewer = {task: labels[task] for task in ("task0", "task3")}
    elif how == "None":
        fewer = labels | {"task1": None, "task2": None}
    else:
        fewer = _masked(labels, {"task1": list(range(len(x))), "task2": list(range(len(x)))})
    present = present_tasks(trainer.meter.losses, [fewer] * len(batches))
    assert present == [0, 3]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    buffer = StepBuffer()
    with NoHostRead():
        losses, _ = trainer.step([(x, fewer)] * len(batches), buffer, present)
    assert list(losses) == ["task0", "task3"]
    assert buffer._steps[0].losses.isnan().tolist() == [False, True, True, False]
    for key, value in model.state_dict().items():
        if key.startswith(("decoders.task1.", "decoders.task2.")):
            assert torch.equal(value, before[key]), key
        if model.task_dims.get(key) == (0,) or key == "loss_scale":
            assert torch.equal(value[1:3], before[key][1:3]), key
    assert not all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    trainer.step(batches, buffer)
    assert flat(model.parameters()).isfinite().all()


def test_a_step_without_any_label_changes_nothing() -> None:
    trainer = make_trainer("MGDA")
    x, labels = next(iter(loaders()))
    before = flat(trainer.model.parameters())
    assert trainer.step([(x, labels)], StepBuffer(), []) == ({}, [])
    assert torch.equal(flat(trainer.model.parameters()), before)
    assert present_tasks(trainer.meter.losses, [{}]) == []


@pytest.mark.parametrize("option", [{"update_weights_every": 3}, {"weight_momentum": 0.5}], ids=str)
def test_held_weights_are_those_of_the_present_tasks(option: dict[str, Any]) -> None:
    trainer = make_trainer("MGDA", count=3, **option)
    batch = next(iter(loaders(3)))
    trainer.step([batch], StepBuffer())
    kept = trainer.step.weights.kept.shared if "update_weights_every" in option else trainer.step.weights.average[0]
    before, shown = kept.clone(), trainer.step.latest.weights
    trainer.step([batch], StepBuffer(), [0, 2])
    # What is still to be logged stays as it was.
    assert torch.equal(shown, before)
    after = trainer.step.weights.kept.shared if "update_weights_every" in option else trainer.step.weights.average[0]
    assert after[1] == before[1]
    assert torch.equal(after, before) == ("update_weights_every" in option)
    trainer.step([batch], StepBuffer())
    assert len(after) == 3


def _in_turn(trainer: Any, steps: int) -> None:
    """Run steps of which none has labels of all three tasks."""
    for step in range(steps):
        inputs, labels = next(iter(loaders(3, seed=step)))
        trainer.step([(inputs, labels)], StepBuffer(), [[0, 1], [1, 2]][step % 2])


def test_weights_are_averaged_where_no_batch_labels_all_tasks() -> None:
    seen: list[Tensor] = []
    trainer = make_trainer("MGDA", count=3, weight_momentum=0.5)
    model: Any = trainer.model
    model.weigh = lambda losses, gram, **hyper: Weights(shared=torch.tensor([1.0, len(seen)]))
    for _ in range(3):
        _in_turn(trainer, 1)
        assert trainer.step.weights.average is not None
        seen.append(trainer.step.weights.average[0].clone())
    assert seen[0][:2].tolist() == [1.0, 0.0]
    assert seen[0][2].isnan()
    assert seen[1][:2].tolist() == [1.0, 0.5]
    assert seen[2][:2].tolist() == [1.0, 1.25]


def test_weights_of_groups_are_averaged_too() -> None:
    trainer = make_trainer("GradVac", count=3, weight_momentum=0.5, weight_args={"GradVac_group_type": 1})
    _in_turn(trainer, 3)
    assert trainer.step.weights.average[0].shape == (2, 3)
    assert flat(trainer.model.parameters()).isfinite().all()


def test_weights_are_held_for_steps_of_the_same_tasks_where_none_is_of_all(tmp_path: Path) -> None:
    solves: list[int] = []

    def counted(trainer: Any) -> Any:
        weigh = trainer.model.weigh

        def counting(*args: Any, **hyper: Any) -> Any:
            solves.append(1)
            return weigh(*args, **hyper)

        trainer.model.weigh = counting
        return trainer

    def run(first: int, last: int, trainer: Any) -> None:
        for step in range(first, last):
            inputs, labels = next(iter(loaders(3, seed=step)))
            trainer.step([(inputs, labels)], StepBuffer(), [0, 1])

    whole, part, other = (counted(make_trainer("MGDA", count=3, update_weights_every=4)) for _ in range(3))
    run(0, 9, whole)
    assert len(solves) == 3
    run(0, 6, part)
    other.model.load_state_dict(part.model.state_dict())
    other.optimizer.load_state_dict(part.optimizer.state_dict())
    torch.save(part.step.state_dict(), tmp_path / "step.pt")
    other.step.load_state_dict(torch.load(tmp_path / "step.pt"))
    run(6, 9, other)
    assert torch.equal(flat(other.model.parameters()), flat(whole.model.parameters()))
    solves.clear()
    # The first step is the last one that these weights hold for.
    _in_turn(whole, 4)
    assert len(solves) == 3


class _Sparse(Dataset[Any]):
    """Rows of three tasks; every batch lacks one of them in turn, and the second task's labels are few."""

    def __getitem__(self, index: int) -> Any:
        x, labels = next(iter(loaders(3, seed=index)))
        given = {task: each for t, (task, each) in enumerate(labels.items()) if t != index % 3}
        return x, _masked(given, {"task1": [0, 1, 2, 5]})

    def __len__(self) -> int:
        return 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EW", "MGDA", "UW", "DWA", "Nash_MTL", "MoCo"])
def test_trains_and_resumes(name: str, tmp_path: Path) -> None:
    data = DataLoader(_Sparse(), batch_size=None)

    def run(epochs: int, **more: Any) -> Tensor:
        trainer = make_trainer(name, count=3, **more)
        trainer.train(data, data, epochs)
        assert all(loss >= 0 for loss in trainer.meter.loss_item)
        return flat([*trainer.model.parameters(), *trainer.model.buffers()])

    run(1, save_path=str(tmp_path))
    assert torch.equal(run(3, resume=str(tmp_path / "last.pt")), run(3))


def test_a_task_without_labels_for_an_epoch_has_no_score() -> None:
    x, labels = next(iter(loaders(2)))
    trainer = make_trainer("DWA")
    trainer.train([(x, {"task0": labels["task0"]})], [(x, labels)], 3)
    trainer.test([(x, {"task0": labels["task0"]})])
    assert str(trainer.meter.loss_item[1]) == "nan"
    assert flat(trainer.model.parameters()).isfinite().all()


@pytest.mark.parametrize("name", ["EW", "MGDA", "MoDo", "AutoLambda"])
def test_a_pass_without_any_label_trains_nothing_and_says_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    x, labels = next(iter(loaders(2)))
    trainer = make_trainer(name)
    before = flat(trainer.model.parameters())
    trainer.train([(x, {})] * 2, [(x, labels)], 1)
    assert torch.equal(flat(trainer.model.parameters()), before)
    assert "No label of task0, task1 was seen in the first epoch" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["EW", "MGDA", "MoDo", "AutoLambda"])
def test_batches_of_a_step_may_label_other_tasks(name: str) -> None:
    x, labels = next(iter(loaders(2)))
    trainer = make_trainer(name, **({"accumulate": 2} if WEIGHTINGS[name].samples == 1 else {}))
    some = [(x, labels), (x, {"task0": labels["task0"]})] * trainer.step.batches
    before = flat(trainer.model.parameters())
    trainer.train(some, [(x, labels)], 1)
    assert flat(trainer.model.parameters()).isfinite().all()
    assert not torch.equal(flat(trainer.model.parameters()), before)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_the_loss_of_an_epoch_is_that_of_all_its_labels(mode: str) -> None:
    (x, labels), *_ = loaders(2, batch=24)
    labels["task0"][:7] = -100
    labels["task1"][[1, 2, 13]] = torch.nan
    batches = [(x[rows], {task: each[rows] for task, each in labels.items()}) for rows in torch.arange(24).split(8)]
    trainer = make_trainer("EW", optim_param={"optim": "sgd", "lr": 0.0})
    expected = [loss.item() for loss in trainer.step.problem.whole(x, labels)[0]]
    if mode == "train":
        trainer.train(batches, batches, 1)
        assert trainer.model.train_loss_buffer[:, 0] == pytest.approx(expected)
    else:
        trainer.test(batches)
        assert trainer.meter.loss_item == pytest.approx(expected)


def test_losses_of_samples_are_averaged_over_those_with_labels() -> None:
    (x, labels), *_ = loaders(3)
    trainer = make_trainer("MoDo", count=3)
    trainer.model.epoch = 0
    expected = torch.stack(trainer.step.problem.whole(x, labels)[0]).detach()
    without = {task: each for task, each in labels.items() if task != "task2"}
    losses, _ = trainer.step([(x, without), (x, labels), (x, without)], StepBuffer())
    torch.testing.assert_close(torch.stack(list(losses.values())), expected)


def test_a_second_look_at_samples_is_their_mean() -> None:
    seen = []

    class TwoSamples(AbsWeighting):
        needs = "losses"
        samples = 2
        looks_back = True

        def weigh(self, losses: Tensor, gram: Tensor | None, **hyper: Any) -> Weights:
            return Weights(shared=torch.ones(losses.shape[-1]))

        def after_step(self, losses: Tensor, **hyper: Any) -> None:
            seen.append(losses)

    trainer = make_trainer(TwoSamples, optim_param={"optim": "sgd", "lr": 0.0})
    trainer.model.epoch = 0
    losses, _ = trainer.step([next(iter(loaders()))] * 2, StepBuffer())
    torch.testing.assert_close(seen[0], torch.stack(list(losses.values())))


def test_entries_of_labels_in_containers() -> None:
    four, one = torch.zeros(2, 2), torch.full((2,), torch.nan).index_fill(0, torch.tensor(0), 1.0)
    given: list[tuple[Any, int]] = [
        (None, 0),
        (four, 4),
        (one, 1),
        ([four, one], 5),
        ({"a": four, "b": {"c": (one, "name")}}, 5),
        ([{"boxes": torch.zeros(0, 4)}, {"boxes": torch.zeros(3, 4)}], 2),
        ((1, 2, 3), 3),
        (object(), 1),
    ]
    for labels, entries in given:
        assert int(labelled_entries(AbsLoss(), labels)) == entries


def test_a_pass_that_goes_on_keeps_the_losses_of_tasks_without_further_labels() -> None:
    whole, rest = make_trainer().meter, make_trainer().meter
    preds = {"task0": torch.eye(3), "task1": torch.zeros(3, 1)}
    labels = {"task0": torch.arange(3), "task1": torch.ones(3, 1)}
    whole.begin()
    whole.update({"task0": torch.tensor(2.0), "task1": torch.tensor(3.0)}, preds, labels)
    rest.begin()
    rest.go_on(whole.loss_sums())
    rest.update({"task1": torch.tensor(5.0)}, preds, labels)
    rest.end()
    assert rest.loss_item.tolist() == [2.0, 4.0]
    assert rest.results["task1"] == [1.0]
    assert math.isnan(rest.results["task0"][0])
