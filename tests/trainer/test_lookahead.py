"""Bilevel strategies: what they look ahead with, and the derivatives they take from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from fastmtl.engine.context import Batch
from fastmtl.engine.lookahead import LookAhead
from fastmtl.errors import UsageError
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting.FORUM import forum_weights
from tests.distributed.looking import Looking
from tests.trainer.toy import batch_of, flat, halves, loaders, make_trainer


def _ahead(trainer: Any, lr: float = 0.05) -> LookAhead:
    batch = batch_of(trainer, *next(iter(loaders(3))))
    return LookAhead(batch, lr, trainer.step.engine.regions, trainer.step.comm)


def _exact_slopes(trainer: Any, ahead: LookAhead, lr: float) -> Tensor:
    """Derivatives of the outer losses, one step on the inner half ahead, by the logits: (T, T), through autograd."""
    model, problem = trainer.model, trainer.step.problem
    named = dict(model.named_parameters())
    logits = model.logits.value.clone().requires_grad_()

    def scores(values: dict[str, Tensor], half: Batch) -> Tensor:
        preds = functional_call(model, values, (half.inputs,))
        return torch.stack(
            [problem.losses[task].compute_loss(preds[task], half.labels[task]) for task in problem.tasks]
        )

    inner = torch.softmax(logits, -1) @ scores(named, ahead.inner)
    grads = torch.autograd.grad(inner, list(named.values()), create_graph=True)
    stepped = {name: value - lr * grad for (name, value), grad in zip(named.items(), grads, strict=True)}
    outer = scores(stepped, ahead.outer)
    return torch.stack([torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in outer])


def _spread_logits(trainer: Any) -> None:
    with torch.no_grad():
        trainer.model.logits.value.copy_(torch.tensor([0.5, -0.3, 0.1]))


def _recorded_slope(trainer: Any, monkeypatch: pytest.MonkeyPatch, ahead: LookAhead, **hyper: float) -> Tensor:
    """The gradient that the strategy hands to Adam."""
    found: list[Tensor] = []
    monkeypatch.setattr(trainer.model.logits, "step", lambda grad, lr: found.append(grad))
    trainer.model.look_ahead(ahead, **hyper)
    return found[0]


def test_moml_moves_along_the_min_norm_combination_of_exact_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("MOML", count=3)
    _spread_logits(trainer)
    ahead = _ahead(trainer)
    slopes = _exact_slopes(trainer, ahead, 0.1)
    slopes = slopes / slopes.norm(dim=1, keepdim=True)
    slope = _recorded_slope(trainer, monkeypatch, ahead, inner_lr=0.1)
    # The shortest vector of the hull: all rows have at least its length along it.
    assert (slopes @ slope >= slope @ slope - 1e-4).all()
    weights = torch.linalg.lstsq(torch.cat([slopes.T, torch.ones(1, 3)]), torch.cat([slope, torch.ones(1)])[:, None])
    torch.testing.assert_close(weights.solution[:, 0] @ slopes, slope, rtol=1e-3, atol=1e-4)


def test_auto_lambda_follows_the_slope_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("AutoLambda", count=3)
    _spread_logits(trainer)
    ahead = _ahead(trainer, lr=0.05)
    expected = _exact_slopes(trainer, ahead, 0.05).sum(0)
    slope = _recorded_slope(trainer, monkeypatch, ahead)
    torch.testing.assert_close(slope, expected, rtol=2e-2, atol=1e-5)


def test_logits_move_against_the_slope_and_the_step_uses_them() -> None:
    trainer = make_trainer("AutoLambda", count=3, weight_args={"outer_lr": 0.05})
    ahead = _ahead(trainer)
    slope = _exact_slopes(trainer, ahead, 0.05).sum(0)
    before, data = trainer.model.logits.value.clone(), next(iter(loaders(3)))
    buffer = StepBuffer()
    trainer.step([data, data], buffer)
    moved = trainer.model.logits.value - before
    torch.testing.assert_close(moved, -0.05 * slope.sign())
    logged = buffer.flush(0, 1).weights
    assert logged is not None
    torch.testing.assert_close(torch.as_tensor(logged[0]).float(), trainer.model.task_weights())


@pytest.mark.parametrize("weighting", ["MOML", "AutoLambda", "FORUM"])
def test_looking_ahead_changes_nothing_but_the_strategy(weighting: str) -> None:
    trainer = make_trainer(weighting, count=3)
    before = flat(trainer.model.parameters())
    trainer.model.epoch = 0
    trainer.model.look_ahead(_ahead(trainer), **trainer.kwargs["weight_args"])
    assert torch.equal(flat(trainer.model.parameters()), before)


def test_moved_brings_parameters_and_buffers_back() -> None:
    trainer = make_trainer("MOML", count=3)
    trainer.model.encoder.register_buffer("seen", torch.zeros(2))
    ahead = _ahead(trainer)
    before = flat(trainer.model.parameters())
    _, row = ahead.gradient(ahead.inner, torch.ones(3))
    with ahead.moved():
        ahead.move(row, 0.5)
        trainer.model.encoder.seen.add_(1)
        assert not torch.equal(flat(trainer.model.parameters()), before)
    assert torch.equal(flat(trainer.model.parameters()), before)
    assert torch.equal(trainer.model.encoder.seen, torch.zeros(2))
    with ahead.moved():
        encoder: Any = trainer.model.encoder
        encoder.seen = encoder.seen + 1
    assert torch.equal(trainer.model.encoder.seen, torch.zeros(2))


def test_moves_along_sparse_gradients_keep_the_touched_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("MOML", count=3, encoder_class=Looking, optim_param={"optim": "sgd", "lr": 0.05})
    ahead = _ahead(trainer)
    before, table = flat(trainer.model.parameters()), trainer.model.encoder.bags.weight
    _, inner = ahead.gradient(ahead.inner, torch.ones(3))
    _, outer = ahead.gradient(ahead.outer, torch.ones(3))
    dense = [None if grad is None else grad.to_dense() for grad in inner]
    clone, cloned = Tensor.clone, list[torch.Size]()

    def seen(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cloned.append(self.shape)
        return clone(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "clone", seen)
    with ahead.moved():
        for row in (inner, outer, inner):
            ahead.move(row, 0.5)
        assert table.shape not in cloned
        with ahead.moved():
            ahead.move(outer, -2)
            ahead.move(dense, 0.3)
            assert table.shape in cloned
            ahead.move(inner, 7)
    assert torch.equal(flat(trainer.model.parameters()), before)


def test_halves_of_nested_batches() -> None:
    x, y = torch.arange(5), torch.arange(10, 15)
    inner, outer = halves(({"a": x, "b": [x, y]}, {"task": y}))
    assert inner[0]["a"].tolist() == [0, 1]
    assert outer[0]["b"][1].tolist() == [12, 13, 14]
    assert outer[1]["task"].tolist() == [12, 13, 14]


def test_one_row_is_both_halves() -> None:
    batch = torch.ones(1, 3), {"task": torch.zeros(1)}
    assert halves(batch) == (batch, batch)


def test_forum_reports_the_whole_batch() -> None:
    trainer = make_trainer("FORUM", count=3)
    trainer.model.epoch = 0
    batch = next(iter(loaders(3)))
    batch[1]["task0"][:3] = -100
    expected = trainer.step.problem.whole(*batch)
    losses, (preds,) = trainer.step([batch], StepBuffer())
    for t, task in enumerate(trainer.task_name):
        torch.testing.assert_close(preds[task], expected[1][task].detach())
        torch.testing.assert_close(losses[task], expected[0][t].detach())


def _forum_value(weights: Tensor, units: Tensor, q: Tensor, phi: float) -> float:
    pull = float((phi - weights @ (units @ q) / (q @ q)).clamp(min=0))
    update = weights @ units + pull * q
    return float(update @ update) - phi * float(q @ q) * pull


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("phi", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("length", [1e-3, 1.0, 30.0])
def test_forum_weights_are_no_worse_than_a_general_solvers(size: int, phi: float, length: float) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        units = torch.nn.functional.normalize(torch.randn(size, 6, dtype=torch.float64, generator=generator))
        q = length * torch.nn.functional.normalize(torch.randn(6, dtype=torch.float64, generator=generator), dim=0)
        weights = forum_weights(units @ units.T, units @ q, q @ q, phi)
        assert weights.sum() == pytest.approx(1)
        assert (weights >= 0).all()
        given, pull = cvxpy.Variable(size, nonneg=True), cvxpy.Variable(nonneg=True)
        slack = phi - (units @ q / (q @ q)).numpy()
        update = units.T.numpy() @ given + pull * q.numpy()
        problem = cvxpy.Problem(
            cvxpy.Minimize(cvxpy.sum_squares(update) - phi * float(q @ q) * pull),
            [cvxpy.sum(given) == 1, pull >= slack @ given],
        )
        problem.solve()
        reference = torch.from_numpy(given.value).clamp(min=0)
        reference /= reference.sum()
        scale = 1 + phi * phi * float(q @ q)
        assert _forum_value(weights, units, q, phi) <= _forum_value(reference, units, q, phi) + 1e-6 * scale


@pytest.mark.parametrize("zero", ["units", "q", "both"])
def test_forum_weights_of_vanishing_gradients_are_finite(zero: str) -> None:
    units = torch.eye(3, dtype=torch.float64) * (0 if zero in ("units", "both") else 1)
    q = torch.ones(3, dtype=torch.float64) * (0 if zero in ("q", "both") else 1)
    weights = forum_weights(units @ units.T, units @ q, q @ q, 0.1)
    assert weights.isfinite().all()
    assert (weights >= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rep_grad": True}, "MOML balances the gradients of parameters: rep_grad must be False"),
        ({"update_weights_every": 2}, "update_weights_every must be 1 for MOML"),
        ({"weight_args": {"inner_step": 5}}, "inner_step of MOML must be one of 1, got 5"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_trainer("MOML", count=3, **options)
