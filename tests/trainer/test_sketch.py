"""Sketched Gram matrices: what they estimate, how far off they are, and that nothing else changes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmtl.engine.layerwise import sketches
from fastmtl.engine.layerwise.signs import Signs
from fastmtl.engine.layerwise.sketches import SketchedVJPs
from fastmtl.engine.layerwise.uses import weight_uses
from fastmtl.engine.trees import tensors_of
from fastmtl.engine.weights import Weights
from fastmtl.trainer.log.jsonl import JsonlLogger, read_jsonl
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.tasks import step_tasks
from tests.trainer.test_layerwise import (
    ENCODERS,
    TASKS,
    WEIGHTS,
    double_batch,
    gram_of,
    plain_rows,
    wide_trainer,
)
from tests.trainer.test_resume import InterruptAt
from tests.trainer.toy import Listener, batch_of, flat, force_way, loaders

# Strategies that need nothing but a Gram matrix of one batch.
STRATEGIES = [
    *("Aligned_MTL", "CAGrad", "ConFIG", "DualProj", "FairGrad", "GradNorm", "GradVac", "IMTL", "MGDA", "Nash_MTL"),
    *("PCD", "PCGrad", "UPGrad"),
]


def _never_checks(trainer: Any) -> Any:
    """Let the steps to come have no exact Gram matrix."""
    trainer.step.engine.method.vjps.left = 10**9
    return trainer


@pytest.mark.parametrize("cotangents", ["keep", "recompute"])
@pytest.mark.parametrize("name", ENCODERS)
def test_pieces_are_the_gradients_times_the_signs(name: str, cotangents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "sketched")
    trainer = _never_checks(wide_trainer(ENCODERS[name], "sketch", cotangents=cotangents, sketch_width=5))
    batch = double_batch(trainer)
    method = trainer.step.engine.method
    torch.manual_seed(5)
    vjps = method.vjps
    state = vjps.signs.generator.get_state()
    done = method(batch_of(trainer, *batch))
    rows, shared = plain_rows(trainer, *batch)
    assert list(vjps.plan.ways.values()) == ["sketched"] * WEIGHTS[name]
    vjps.signs.generator.set_state(state)
    weights = list(vjps.plan.ways)
    names = {param: known for known, param in trainer.model.named_parameters()}
    shapes = [vjps.layers[weight].omega for weight in weights]
    signs = vjps.signs.draw([(groups, 4, fan_in) for groups, _, fan_in in shapes], torch.float64)
    torch.manual_seed(5)
    uses = weight_uses(tensors_of(trainer.model.trunk(batch[0])), weights)
    for weight, drawn in zip(weights, signs, strict=True):
        # The mean of the inputs, patch by patch but for the borders, and what the signs have beside it.
        mean = sum(use.inputs.sum([0, *range(2, use.inputs.dim())]) for use in uses[weight])
        mean = mean.unflatten(0, (len(drawn), -1)).repeat_interleave(max(1, weight[0, 0].numel()), 1)
        mean = mean / mean.norm(dim=1, keepdim=True)
        beside = drawn - torch.einsum("gki,gi,gj->gkj", drawn, mean, mean)
        omega = torch.cat([mean[:, None], beside / 2], 1)
        place = next(k for k, param in enumerate(shared) if param is weight)
        for row, piece in zip(rows, done.rows, strict=True):
            grad = row[place].T if names[weight] == "encoder.twice" else row[place]
            want = grad.unflatten(0, (len(drawn), -1)).flatten(2) @ omega.mT
            torch.testing.assert_close(piece[place], want, rtol=1e-5, atol=1e-7)
    if weights:
        done.pullback.write(Weights(shared=torch.tensor([0.3, 1.0, -2.0]).double()), done, method.comm, ())
        for k, param in enumerate(shared):
            want = 0.3 * rows[0][k] + rows[1][k] - 2 * rows[2][k]
            torch.testing.assert_close(param.grad, want.float().double(), rtol=1e-5, atol=1e-7)


def _estimates(trainer: Any, batch: Any, count: int) -> Tensor:
    """Gram matrices (count, T, T) of as many draws of the signs, of the same gradients."""
    method, grams = trainer.step.engine.method, []
    whole = batch_of(trainer, *batch)
    method.prepare(whole)
    features, _, _, cotangents, _ = method.heads(method.trunk(whole), whole)
    for _ in range(count):
        method.vjps.begin(first=True)
        update = method.vjps(features, cotangents, whole.tasks)
        grams.append(update.gram(update.rows, None, method.comm, None))
    return torch.stack(grams)


@pytest.mark.parametrize("name", ["images", "attention"])
def test_estimates_are_unbiased(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hotelling's test of the mean of 500 draws, at a level of 1e-4."""
    force_way(monkeypatch, "sketched")
    trainer = _never_checks(wide_trainer(ENCODERS[name], "sketch", sketch_width=4))
    batch = double_batch(trainer)
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            module.eval()
    want = gram_of(plain_rows(trainer, *batch)[0])
    row, column = torch.triu_indices(TASKS, TASKS)
    differences = (_estimates(trainer, batch, 500) - want)[:, row, column]
    mean, spread = differences.mean(0), torch.cov(differences.T)
    hotelling = len(differences) * float(mean @ torch.linalg.solve(spread, mean))
    # The 0.9999 quantile of chi-square with 6 degrees of freedom, which 500 draws are near to, times 1.03.
    assert len(mean) == 6
    assert hotelling < 28.7
    assert float((differences.std(0) / want[row, column].abs().max()).max()) > 1e-3


def test_the_bound_on_the_error_holds_and_is_not_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "sketched")
    trainer = _never_checks(wide_trainer(ENCODERS["images"], "sketch", sketch_width=4))
    batch = double_batch(trainer)
    rows, shared = plain_rows(trainer, *batch)
    estimates = _estimates(trainer, batch, 400)
    ratio = estimates.var(0) / sum(_bounds(trainer, batch, rows, shared).values())
    assert float(ratio.max()) < 1.2
    assert float(ratio.diagonal().min()) > 0.2


def _bounds(trainer: Any, batch: Any, rows: Any, shared: Any) -> dict[Tensor, Tensor]:
    """The bounds on the variance of each layer's part."""
    vjps = trainer.step.engine.method.vjps
    places = {param: place for place, param in enumerate(shared)}
    uses = weight_uses(tensors_of(trainer.model.trunk(batch[0])), vjps.layers)
    totals = vjps._sums(list(uses), uses)
    return {
        weight: vjps._variance(weight, totals[weight], [row[places[weight]] for row in rows]) for weight in vjps.layers
    }


def test_layers_that_would_make_the_error_large_are_not_sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    force_way(monkeypatch, "sketched")
    monkeypatch.setattr(sketches, "LARGEST_ERROR", 0.05)
    trainer = wide_trainer(ENCODERS["images"], "sketch", logger=listener, sketch_width=8, cotangents="keep")
    batch = double_batch(trainer)
    rows, shared = plain_rows(trainer, *batch)
    trainer.step([batch], StepBuffer())
    # What holds of the first step's parameters decides.
    method = trainer.step.engine.method
    exact = gram_of(rows)
    fresh = wide_trainer(ENCODERS["images"], "sketch")
    method.problem.model.load_state_dict(fresh.model.double().state_dict())
    parts = {
        weight: float((bound / exact.diagonal().outer(exact.diagonal())).max())
        for weight, bound in _bounds(trainer, batch, rows, shared).items()
    }
    # All save as much.
    assert [weight in method.vjps.plan.ways for weight in parts] == [part <= 0.05**2 / 4 for part in parts.values()]
    count = len(method.vjps.plan.ways)
    assert 0 < count < 4
    trainer.step([batch], StepBuffer())
    (message,) = listener.messages
    assert message.startswith(f"vjps: layer by layer, {count} sketched (width 8), {4 - count} direct; cotangents kept")


@pytest.mark.parametrize("weighting", STRATEGIES)
def test_every_strategy_that_needs_a_gram_matrix(weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is the strategy's for the estimate: that of its weights and the plain network's gradients."""
    force_way(monkeypatch, "sketched")
    trainer = _never_checks(wide_trainer(ENCODERS["mlp"], "sketch", weighting, sketch_width=64))
    trainer.model.epoch = 0
    decided: list[Any] = []
    solve = trainer.step.solve

    def solved(jacobian: Any) -> Any:
        decided.append(solve(jacobian))
        return decided[0]

    trainer.step.solve = solved
    batch = double_batch(trainer)
    rows, shared = plain_rows(trainer, *batch)
    torch.manual_seed(5)
    trainer.step([batch], StepBuffer())
    latest = trainer.step.latest
    estimate, exact = latest.gram, gram_of(rows)
    norms = exact.diagonal().sqrt()
    assert 1e-4 < float(((estimate - exact) / norms[:, None] / norms).abs().max()) < 0.5
    if weighting == "GradVac":
        # Its groups have weights of their own.
        return
    weights = decided[0].shared
    update = [sum(w * row[k] for w, row in zip(weights, rows, strict=True)) for k in range(len(shared))]
    if weighting == "Nash_MTL":
        limit = 1 / float(flat(update).norm())
        update = [grad * min(1.0, limit) for grad in update]
    for param, want in zip(shared, update, strict=True):
        torch.testing.assert_close(param.grad, want, rtol=2e-5, atol=1e-6)


def test_the_norm_that_is_limited_is_that_of_the_gradient_written(monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "sketched")
    trainer = _never_checks(
        wide_trainer(ENCODERS["mlp"], "sketch", "Nash_MTL", sketch_width=2, weight_args={"max_norm": 0.05})
    )
    trainer.step([double_batch(trainer)], StepBuffer())
    shared = trainer.step.problem.shared_params
    assert float(flat([param.grad for param in shared]).norm()) == pytest.approx(0.05, rel=1e-4)


def test_a_comparison_with_the_exact_matrix_goes_to_the_log_and_its_step_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_way(monkeypatch, "sketched")
    path = tmp_path / "metrics.jsonl"
    ends, grams = [], []
    for vjps in ("sequential", "sketch"):
        logger = JsonlLogger(path) if vjps == "sketch" else None
        trainer = wide_trainer(
            ENCODERS["mlp"], vjps, logger=logger, gram_check_every=4, sketch_width=3, log_every=1, save_path=None
        )
        torch.manual_seed(5)
        trainer.train(loaders(TASKS, rows=8), loaders(TASKS, rows=8), 1)
        ends.append(flat(trainer.model.parameters()))
        grams.append(trainer.step.latest.gram)
    torch.testing.assert_close(*grams, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)
    torch.manual_seed(5)
    trainer = wide_trainer(
        ENCODERS["mlp"], "sketch", logger=JsonlLogger(path), gram_check_every=4, sketch_width=3, log_every=1
    )
    trainer.train(loaders(TASKS, rows=80), loaders(TASKS, rows=8), 1)
    errors = [row["gram"]["error"] for row in read_jsonl(path) if row["event"] == "steps" and "gram" in row]
    assert len(errors) == 3
    assert all(0 < error < 2 for error in errors)
    assert json.dumps(errors)


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_undisturbed_one(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "optim_param": {"optim": "adam", "lr": 1e-2},
        "log_every": 1,
        "gram_check_every": 3,
        "sketch_width": 8,
    }
    monkeypatch.setattr(sketches, "LARGEST_ERROR", 0.1)
    force = pytest.MonkeyPatch()
    force_way(force, "sketched")
    force.setattr(sketches, "LARGEST_ERROR", 0.1)
    whole = wide_trainer(ENCODERS["mlp"], "sketch", **options)
    torch.manual_seed(5)
    whole.train(loaders(TASKS, shuffle=True), loaders(TASKS), 3)
    first = wide_trainer(ENCODERS["mlp"], "sketch", save_path=str(tmp_path), logger=InterruptAt(step), **options)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        first.train(loaders(TASKS, shuffle=True), loaders(TASKS), 3)
    torch.manual_seed(1234)
    second = wide_trainer(ENCODERS["mlp"], "sketch", resume=str(tmp_path / "last.pt"), **options)
    second.train(loaders(TASKS, shuffle=True), loaders(TASKS), 3)
    force.undo()
    assert isinstance(second.step.engine.method.vjps, SketchedVJPs)
    assert torch.equal(flat(second.model.parameters()), flat(whole.model.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"channels_last": True},
        {"clip_grad_norm": 0.1},
        {"update_weights_every": 2},
        {"tasks_per_step": 2},
        {"weight_momentum": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["images", "attention"])
def test_with_other_options_training_is_near_the_exact_one(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches lack the labels of a task now and then."""
    force_way(monkeypatch, "sketched")
    ends, starts = [], []
    for vjps in ("sequential", "sketch"):
        extra = {"sketch_width": 512} if vjps == "sketch" else {}
        trainer = wide_trainer(ENCODERS[name], vjps, **options, **extra)
        starts.append(flat(trainer.model.parameters()))
        batches = list(loaders(TASKS, rows=40))
        del batches[1][1]["task0"]
        batches[2][1]["task1"][3] = torch.nan
        torch.manual_seed(5)
        # Draws the tasks of a step.
        random.seed(5)
        trainer.train(batches, loaders(TASKS), 1)
        ends.append(flat(trainer.model.parameters()))
    moved = (ends[0] - starts[0]).norm()
    assert moved > 0.01
    assert (ends[1] - ends[0]).norm() < 0.15 * moved


def test_an_estimate_that_is_far_off_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    force_way(monkeypatch, "sketched")
    trainer = wide_trainer(ENCODERS["mlp"], "sketch", gram_check_every=1, sketch_width=2, log_every=2)
    trainer.train(loaders(TASKS, rows=64), loaders(TASKS, rows=8), 1)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sketch: ")]
    assert len(told) == 1
    assert "a larger sketch_width" in told[0]


def test_a_run_that_went_another_way_goes_on_sketched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "sketched")
    first = wide_trainer(ENCODERS["mlp"], "layerwise", save_path=str(tmp_path))
    first.train(loaders(TASKS), loaders(TASKS), 1)
    second = wide_trainer(ENCODERS["mlp"], "sketch", resume=str(tmp_path / "last.pt"), sketch_width=8)
    second.train(loaders(TASKS), loaders(TASKS), 2)
    assert list(second.step.engine.method.vjps.plan.ways.values()) == ["sketched"] * 2


@pytest.mark.parametrize("cotangents", ["keep", "recompute"])
def test_a_weight_that_is_used_in_another_way_later_has_its_whole_gradient(
    cotangents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_way(monkeypatch, "sketched")

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.grown = nn.Linear(6, 16), nn.Linear(16, 64), False

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs).tanh()
            last: Tensor = self.last(hidden)
            return last + self.last.weight.sum(1) if self.grown else last

    trainer = _never_checks(wide_trainer(Growing, "sketch", cotangents=cotangents))
    batch = double_batch(trainer)
    trainer.step([batch], StepBuffer())
    trainer.model.encoder.grown = True
    rows, shared = plain_rows(trainer, *batch)
    trainer.step([batch], StepBuffer())
    weights = trainer.step.latest.weights
    for k, param in enumerate(shared):
        want = sum(w * row[k] for w, row in zip(weights, rows, strict=True))
        torch.testing.assert_close(param.grad, want, rtol=1e-5, atol=1e-7)


def test_cotangents_are_kept_where_backward_passes_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "compressed")

    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 64)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden: Tensor = self.first(inputs).tanh()
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
            last: Tensor = self.last(hidden)
            return last

    trainer = wide_trainer(Limited, "layerwise", cotangents="recompute")
    batch = double_batch(trainer)
    rows, shared = plain_rows(trainer, *batch)
    trainer.step([batch], StepBuffer())
    assert trainer.step.engine.method.vjps.plan.kept
    weights = trainer.step.latest.weights
    for k, param in enumerate(shared):
        want = sum(w * row[k] for w, row in zip(weights, rows, strict=True))
        torch.testing.assert_close(param.grad, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cotangents", ["keep", "recompute"])
@pytest.mark.parametrize("weighting", ["MoDo", "SDMGrad"])
def test_batches_of_a_step_share_their_signs(weighting: str, cotangents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "sketched")
    trainer = wide_trainer(ENCODERS["images"], "sketch", weighting, cotangents=cotangents, sketch_width=5)
    trainer = _never_checks(trainer)
    trainer.model.double()
    batches = [(x.double(), {**y, "task1": y["task1"].double()}) for x, y in list(loaders(TASKS, rows=24))[:3]]
    rows = [plain_rows(trainer, *batch) for batch in batches]
    shared = rows[0][1]
    engine = trainer.step.engine
    done = engine.differentiate(trainer.step._context(batches, step_tasks([0, 1, 2], trainer.task_name)), None)
    omegas = engine.method.vjps._omegas
    assert len(omegas) == 4
    whole = [row for of_batch, _ in rows for row in of_batch]
    # Signs are drawn in float32.
    omegas = {param: omega.double() for param, omega in omegas.items()}

    def pieces(row: list[Tensor]) -> list[Tensor]:
        return [
            grad.unflatten(0, (len(omegas[param]), -1)).flatten(2) @ omegas[param].mT if param in omegas else grad
            for grad, param in zip(row, shared, strict=True)
        ]

    want = gram_of([pieces(row) for row in whole])
    torch.testing.assert_close(done.gram(), want, rtol=1e-6, atol=1e-9 * float(want.max()))
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64)
    done.write_grads(Weights(shared=weights, heads=torch.ones(9, dtype=torch.float64) if weighting == "MoDo" else None))
    for k, param in enumerate(shared):
        sums = sum(w * row[k] for w, row in zip(weights, whole, strict=True))
        torch.testing.assert_close(param.grad, sums, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weighting", ["MoDo", "SDMGrad"])
def test_steps_of_several_batches_that_compare_are_exact(weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_way(monkeypatch, "sketched")
    ends = []
    for vjps in ("sequential", "sketch"):
        trainer = wide_trainer(ENCODERS["signals"], vjps, weighting, gram_check_every=1)
        trainer.model.double()
        torch.manual_seed(5)
        batches = [(x.double(), {**y, "task1": y["task1"].double()}) for x, y in loaders(TASKS, rows=48)]
        for start in (0, 3):
            trainer.step(batches[start : start + 3], StepBuffer())
        ends.append(flat(trainer.model.parameters()))
        if vjps == "sketch":
            assert float(trainer.step.latest.gram_error) > 0
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_signs_are_fair_and_go_on_where_they_were() -> None:
    signs = Signs(torch.device("cpu"), 3)
    (first,) = signs.draw([(1000, 63)])
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(first.mean())) < 0.02
    # Columns, and neighbours, are independent.
    assert float((first.T @ first / 1000 - torch.eye(63)).abs().max()) < 0.2
    state = signs.generator.get_state()
    (second,) = signs.draw([(10, 3)])
    signs.generator.set_state(state)
    assert torch.equal(second, signs.draw([(10, 3)])[0])
    assert not torch.equal(first[:10, :3], second)
