"""Losses that are zero, negative or tiny: what a strategy takes, what it leaves out, what it refuses."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmtl import balance
from fastmtl.errors import NonFiniteError, UsageError
from fastmtl.loss import MSELoss
from fastmtl.metrics import L1Metric
from fastmtl.scalarization import FAMO, GeometricMean
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting import WEIGHTINGS
from fastmtl.weighting.GO4Align import cluster_means
from fastmtl.weighting.rules import descent_rates
from tests.host_reads import NoHostRead
from tests.trainer.toy import flat, make_trainer

TASKS = ("a", "b", "c")
SATISFIED = 1e3
_EXPERTS: dict[str, Any] = {"img_size": [6], "num_experts": [2]}
# Strategies that take no loss of 0, with hyper-parameters.
POSITIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "SI": ("SI", {}),
    "GLS": ("GLS", {}),
    "FAMO": ("FAMO", {}),
    "DB_MTL": ("DB_MTL", {}),
    "GO4Align": ("GO4Align", {}),
    "STCH-warm-up": ("STCH", {}),
    "STCH": ("STCH", {"STCH_warmup_epoch": 0}),
    "MGDA-loss": ("MGDA", {"mgda_gn": "loss"}),
    "MGDA-loss+": ("MGDA", {"mgda_gn": "loss+"}),
}
NON_NEGATIVE = ("DWA", "GradNorm", "IMTL", "MoCo", "UW")


class _Hinge(MSELoss):
    """The squared error, exactly 0 where the label says that the example is satisfied, times and plus a number."""

    def __init__(self, factor: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.factor, self.shift = factor, shift

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        squares = torch.where(gt == SATISFIED, 0.0, (pred - gt) ** 2)
        return squares.mean() * self.factor + self.shift


def _trainer(name: str, loss_b: Any = None, count: int = 3, **options: Any) -> Any:
    losses = {"b": loss_b or _Hinge()}
    tasks = {
        task: {"metrics": ["L1"], "metrics_fn": L1Metric(), "loss_fn": losses.get(task, _Hinge()), "weight": [0]}
        for task in TASKS[:count]
    }
    options.setdefault("rep_grad", WEIGHTINGS[name].needs == "reps")
    torch.manual_seed(0)
    decoders = nn.ModuleDict({task: nn.Linear(8, 1) for task in tasks})
    trainer = make_trainer(name, task_dict=tasks, decoders=decoders, **options)
    trainer.model.epoch, trainer.model.epochs = 0, 3
    trainer.model.train_loss_buffer = np.ones((count, 3))
    return trainer


def _batch(seed: int = 0, satisfied: str = "", missing: str = "") -> Any:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, 6, generator=generator)
    labels = {task: torch.randn(8, 1, generator=generator) for task in TASKS}
    labels = {task: torch.full_like(value, SATISFIED) if task in satisfied else value for task, value in labels.items()}
    return inputs, {task: value for task, value in labels.items() if task not in missing}


def _run(trainer: Any, batches: list[Any]) -> Tensor:
    """Return all parameters, and what is remembered, after one step for each batch, the third of a new epoch."""
    for index, batch in enumerate(batches):
        trainer.model.epoch = index // 2
        present = [t for t, task in enumerate(trainer.task_name) if task in batch[1]]
        trainer.step([batch] * trainer.step.batches, StepBuffer(), present)
    trainer.guard.check(None)
    return flat([*trainer.model.parameters(), *trainer.model.buffers()])


@pytest.mark.slow
@pytest.mark.parametrize("case", POSITIVE)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_momentum": 0.5}, {"precision": "fp16"}, {"architecture": "MMoE", "arch_args": _EXPERTS}],
    ids=["plain", "momentum", "fp16", "MMoE"],
)
def test_a_loss_of_zero_counts_as_a_missing_label(case: str, options: dict[str, Any]) -> None:
    name, args = POSITIVE[case]
    options = {**options, "weight_args": args, "optim_param": {"optim": "sgd", "lr": 0.05}}
    rest = [_batch(2), _batch(3, satisfied="c"), _batch(4)]
    zero = _run(_trainer(name, **options), [_batch(), _batch(1, satisfied="b"), *rest])
    rest[1] = _batch(3, missing="c")
    missing = _run(_trainer(name, **options), [_batch(), _batch(1, missing="b"), *rest])
    torch.testing.assert_close(zero, missing, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", POSITIVE)
def test_all_losses_zero_change_nothing(case: str) -> None:
    name, args = POSITIVE[case]
    trainer = _trainer(name, weight_args=args, optim_param={"optim": "sgd", "lr": 0.05})
    _run(trainer, [_batch()] * 3)
    before = flat([*trainer.model.parameters(), *trainer.step.strategy.buffers()])
    trainer.step([_batch(1, satisfied="abc")], StepBuffer())
    after = flat([*trainer.model.parameters(), *trainer.step.strategy.buffers()])
    counts = {"steps", "famo_steps"} & set(dict(trainer.model.named_buffers()))
    assert (before != after).sum() == len(counts)
    assert trainer.latest.weights is None or not trainer.latest.weights.any()


def test_weights_of_positive_losses_are_the_formulas() -> None:
    """A task with loss 0 between two others, by hand."""
    losses = torch.tensor([0.5, 0.0, 2.0])
    rule = SimpleNamespace(epoch=9, loss_sum=torch.tensor([1.0, 1.0, 1.0]), loss_count=torch.ones(3))
    found = {name: WEIGHTINGS[name].weigh(rule, losses, None).shared for name in ("SI", "GLS", "STCH")}
    assert found["SI"].tolist() == [2.0, 0.0, 0.5]
    torch.testing.assert_close(found["GLS"], torch.tensor([1.0, 0.0, 0.25]))
    # 2 softmax(log L) / L = 2 / (0.5 + 2)
    torch.testing.assert_close(found["STCH"], torch.tensor([0.8, 0.0, 0.8]))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
@pytest.mark.parametrize("tiny", [0.0, 1e-30], ids=["zero", "tiny"])
def test_takes_losses_of_zero_and_tiny_ones(name: str, tiny: float) -> None:
    trainer = _trainer(name, _Hinge(factor=tiny))
    before = trainer.model.decoders["a"].weight.clone()
    assert _run(trainer, [_batch(seed) for seed in range(5)]).isfinite().all()
    assert name in ("FAMO", "GLS") or not torch.equal(trainer.model.decoders["a"].weight, before)


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_negative_losses_are_taken_or_refused(name: str, tmp_path: Path) -> None:
    example = _batch()[0][0], {task: label[0] for task, label in _batch()[1].items()}
    data: Any = torch.utils.data.DataLoader([example] * 4, batch_size=2)
    trainer = _trainer(name, _Hinge(factor=0.01, shift=-1.5), save_path=str(tmp_path))
    before = flat(trainer.model.parameters())
    if WEIGHTINGS[name].needs_losses == "any":
        trainer.train(data, data, 1)
        assert not torch.equal(flat(trainer.model.parameters()), before)
        return
    words = f"{WEIGHTINGS[name].needs_losses} losses: {re.escape(WEIGHTINGS[name].use_of_losses)}"
    with pytest.raises(
        UsageError,
        match=rf"^The loss of b was -1\.[45]\d* in training step 0, but {name} needs {words}; parameters were not",
    ):
        trainer.train(data, data, 1)
    assert torch.equal(flat(trainer.model.parameters()), before)
    assert not list(tmp_path.iterdir())


def test_which_strategies_need_what() -> None:
    found = {need: sorted(n for n, r in WEIGHTINGS.items() if r.needs_losses == need) for need in ("any", "positive")}
    assert found["positive"] == sorted({name for name, _ in POSITIVE.values()} - {"MGDA"})
    assert set(WEIGHTINGS) - set(found["any"]) - set(found["positive"]) == set(NON_NEGATIVE)
    assert all(rule.use_of_losses for name, rule in WEIGHTINGS.items() if name not in found["any"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SI", {"accumulate": 2}),
        ("SI", {"precision": "fp16"}),
        ("SI", {"tasks_per_step": 2}),
        ("MGDA", {"weight_args": {"mgda_gn": "loss"}, "update_weights_every": 2}),
        ("DWA", {}),
        ("UW", {"weight_momentum": 0.5}),
    ],
    ids=str,
)
def test_a_loss_that_turns_negative_is_named_with_its_step(name: str, options: dict[str, Any]) -> None:
    trainer = _trainer(name, _Hinge(factor=-1e-3), **options)
    for seed in range(2):
        trainer.step([_batch(seed, satisfied="b")] * trainer.step.batches, StepBuffer(), [0, 2])
    trainer.guard.check(None)
    before = flat(trainer.model.parameters())
    trainer.step.sampler.per_step = None
    trainer.step([_batch(5)] * trainer.step.batches, StepBuffer())
    # The first step with all tasks may look at the network.
    with NoHostRead():
        trainer.step([_batch(6)] * trainer.step.batches, StepBuffer())
    with pytest.raises(UsageError, match=rf"loss of b was -\d.* in training step 2, but {name} needs .*losses"):
        trainer.guard.check(None)
    assert torch.equal(flat(trainer.model.parameters()), before)


def test_held_weights_of_a_task_left_out_are_those_before() -> None:
    trainer = _trainer("MGDA", weight_args={"mgda_gn": "loss"}, update_weights_every=2)
    found = []
    for batch in (_batch(satisfied="b"), _batch(1), _batch(2), _batch(3), _batch(4, satisfied="b")):
        trainer.step([batch], StepBuffer())
        found.append(trainer.step.weights.kept.shared.clone())
    assert found[0][1] == found[1][1] == 1
    assert found[2][1] == found[4][1] != 1
    assert found[2][0] != found[4][0]


def test_several_bad_losses_are_all_named() -> None:
    trainer = _trainer("SI", _Hinge(shift=-1e3))
    trainer.meter.losses["c"].shift = -2e3
    trainer.step([_batch()], StepBuffer())
    with pytest.raises(UsageError, match=r"^The loss of b, c was -99\d(\.\d)?, -199\d in training step 0, but SI"):
        trainer.guard.check("last.pt")


def test_an_infinite_loss_is_no_negative_one() -> None:
    trainer = _trainer("SI", _Hinge(shift=-math.inf))
    trainer.step([_batch()], StepBuffer())
    with pytest.raises(NonFiniteError, match="loss of b became NaN or infinite in training step 0"):
        trainer.guard.check(None)


def test_famo_goes_by_its_lower_bounds() -> None:
    """Bounds below the losses make negative ones good, also beside tasks without labels; bounds above refuse them."""
    trainer = _trainer("FAMO", _Hinge(factor=0.01, shift=-1.5))
    trainer.model.min_losses.copy_(torch.tensor([1e-3, -2.0, 1e-3]))
    assert _run(trainer, [_batch(), _batch(1, missing="a"), _batch(2)]).isfinite().all()
    trainer.model.min_losses[1] = -1.0
    trainer.step([_batch()], StepBuffer())
    with pytest.raises(UsageError, match=r"loss of b was -1\.\d+ .* FAMO .* above min_losses"):
        trainer.guard.check(None)


def test_dwa_and_gradnorm_without_a_first_loss() -> None:
    newer, older = torch.tensor([1.0, 0.5, 3.0, 0.0]), torch.tensor([2.0, 0.0, 2.0, 1.0])
    weights = descent_rates(newer, older, 2.0)
    known = [0, 2, 3]
    expected = 3 * torch.softmax(newer[known] / older[known] / 2.0, 0)
    torch.testing.assert_close(weights, torch.cat([expected[:1], torch.ones(1), expected[1:]]))
    assert torch.equal(descent_rates(newer, torch.zeros(4), 2.0), torch.ones(4))

    trainer = _trainer("GradNorm")
    trainer.model.epoch = 1
    trainer.model.train_loss_buffer = np.array([[1.0], [0.0], [2.0]])
    trainer.model.start_epoch()
    gram = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    found = trainer.model.weigh(torch.tensor([1.0, 5.0, 1.0]), gram).own_grads["loss_scale"]
    # All weights are 1: norms 1, 2, 3, their mean 2, rates 1, none and 0.5, relative 4/3, 1 and 2/3.
    norms, target = torch.tensor([1.0, 2.0, 3.0]), 2 * torch.tensor([4 / 3, 1.0, 2 / 3]) ** 1.5
    slope = torch.sign(norms - target) * norms
    torch.testing.assert_close(found, slope - slope.mean())


def test_clusters_of_the_numbers_that_are_known() -> None:
    values, known = torch.tensor([1.0, 50.0, 1.2, 9.0, -7.0, 9.4]), torch.tensor([True, False, True, True, False, True])
    for clusters in (1, 2, 3, 6):
        whole = cluster_means(values, clusters, known)[known]
        assert torch.equal(whole, cluster_means(values[known], clusters))


def test_a_loop_that_calls_backward_gets_the_same_sentence() -> None:
    model = _trainer("SI").model
    losses = torch.stack([p.pow(2).sum() for p in list(model.parameters())[:3]])
    model.backward(losses)
    with pytest.raises(UsageError, match=r"^The loss of b is -\d.*, but SI needs positive losses: it takes their log"):
        model.backward(losses * torch.tensor([1.0, -1.0, 1.0]))


def test_balance_takes_any_loss() -> None:
    """Its weightings see gradients alone."""
    for weighting in ("mgda", "upgrad", "imtlg", "config", "aligned_mtl"):
        grads = []
        for shift in (0.0, -100.0):
            x = torch.tensor([1.0, 2.0], requires_grad=True)
            balance([x[0] ** 2 + shift, (x[0] - x[1]) ** 2], shared=[x], weighting=weighting)
            grads.append(x.grad)
        assert torch.equal(*grads)


def test_scalarizers_leave_out_losses_of_zero() -> None:
    values = torch.tensor([4.0, 0.0, 1.0], requires_grad=True)
    mean = GeometricMean()(values)
    mean.backward()
    assert mean.item() == pytest.approx(2)
    torch.testing.assert_close(values.grad, torch.tensor([0.25, 0.0, 1.0]))

    famo = FAMO(3)
    values = torch.tensor([4.0, 0.0, 1.0], requires_grad=True)
    famo(values).backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.2, 0.0, 0.8]))
    famo.update(torch.tensor([2.0, 0.5, 1.0]))
    logits = next(famo.parameters())
    assert logits[0] < 0 < logits[2]
    assert logits[1] == 0
    with pytest.raises(UsageError, match="at least min_losses"):
        famo(-values)


class _Rounded(MSELoss):
    """A loss of one value, with a slope."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return (pred - pred.detach()).mean() + self.value


@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_a_loss_negative_by_rounding_counts_as_0(name: str) -> None:
    def end(value: float) -> Tensor:
        optim = "adam" if WEIGHTINGS[name].steers_adam else "sgd"
        trainer = _trainer(name, _Rounded(value), optim_param={"optim": optim, "lr": 0.05})
        return _run(trainer, [_batch(seed) for seed in range(5)])

    of_zero = end(0.0)
    for value in (-1.192e-07, -2.6e-08, -4e-06):
        torch.testing.assert_close(end(value), of_zero, rtol=1e-4, atol=1e-4, msg=f"A loss of {value} is none of 0.")


@pytest.mark.parametrize("name", ["DWA", "UW", "SI", "FAMO", "GradNorm"])
@pytest.mark.parametrize("kind", ["cosine", "divergence"])
def test_losses_at_their_optimum_end_no_run(name: str, kind: str) -> None:
    class AtOptimum(MSELoss):
        """The loss of predictions that are their labels."""

        def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
            rows = torch.randn(64, 5, generator=torch.Generator().manual_seed(3)) + 0 * pred.mean()
            if kind == "cosine":
                p = nn.functional.normalize(rows)
                return 1 - (p * p.detach()).sum(1).mean()
            logs = rows.log_softmax(1)
            return nn.functional.kl_div(logs, rows.softmax(1).detach(), reduction="batchmean")

    trainer = _trainer(name, AtOptimum())
    assert _run(trainer, [_batch(seed) for seed in range(5)]).isfinite().all()


def test_scalarizers_take_losses_negative_by_rounding() -> None:
    for scalarizer in (FAMO(3), GeometricMean()):
        values = torch.tensor([4.0, -1.2e-7, 1.0], requires_grad=True)
        exact = torch.tensor([4.0, 0.0, 1.0], requires_grad=True)
        result, expected = scalarizer(values), scalarizer(exact)
        torch.testing.assert_close(result, expected)
        result.backward()
        expected.backward()
        torch.testing.assert_close(values.grad, exact.grad)
    for scalarizer in (FAMO(3), GeometricMean()):
        with pytest.raises(UsageError, match="values must be at least"):
            scalarizer(torch.tensor([4.0, -1e-3, 1.0]))
