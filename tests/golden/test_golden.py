"""LibMTL's recorded training runs, replayed from start to end and one step at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl import Trainer, ops
from fastmtl.engine.lookahead import LookAhead
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.weighting import WEIGHTINGS, Weights
from tests.golden.cases import Golden, close
from tests.trainer.toy import batch_of, flat

RECORDED = sorted(Path(__file__).parent.glob("*.npz"))
_MORE = os.environ.get("FASTMTL_GOLDEN")
PATHS = [*RECORDED, *(sorted(Path(_MORE).glob("*.npz")) if _MORE else [])]
# What one step does depends on the parameters and the batch alone.
STATELESS = {
    "EW",
    "UW",
    "GLS",
    "RLW",
    "MGDA",
    "PCGrad",
    "IMTL",
    "CAGrad",
    "Aligned_MTL",
    "UPGrad",
    "FairGrad",
    "GradDrop",
}
# LibMTL logs ones, nothing or another formula for these; fastmtl logs the weights it used.
LOGS_OTHERWISE = {"GLS", "STCH", "DB_MTL", "GradVac", "FAMO", "GradDrop", "SDMGrad"}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.read(request.param)


def _detached_encoder(golden: Golden) -> bool:
    """Whether LibMTL cuts the graph at the representation for a strategy that never closes it: the encoder stays.

    fastmtl trains the encoder there, so only the decoders can agree, and only from one recorded state to the next.
    """
    return golden.meta["rep_grad"] and WEIGHTINGS[golden.meta["weighting"]].needs == "losses"


def _replay(golden: Golden, model: Any, monkeypatch: pytest.MonkeyPatch, first: int = 0) -> None:
    """Let a random strategy draw what it drew in the recording, from step ``first`` on."""
    arrays, name = golden.arrays, golden.meta["weighting"]
    steps = iter(range(first, golden.steps))
    if name == "RLW":
        weights = torch.from_numpy(arrays["batch_weight"]).flatten(1)
        monkeypatch.setattr(model, "draw", lambda like: weights[:, next(steps)].to(like), raising=True)
    if name in ("PCGrad", "GradVac"):
        orders = torch.from_numpy(arrays["orders"])
        monkeypatch.setattr(model, "draw_orders", lambda like: orders[next(steps)], raising=True)
    if name == "GradDrop":
        noise, drop = torch.from_numpy(arrays["noise"]), ops.graddrop

        def replayed(reps: list[Tensor], grads: list[Tensor], leak: float, random: Tensor) -> list[Tensor]:
            return drop(reps, grads, leak, random, noise[next(steps)].reshape(grads[0].shape[1:]))

        monkeypatch.setattr(ops, "graddrop", replayed)


def _replay_moml(golden: Golden, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MOML use the weights that explain the recorded updates: its solver stops early, an exact one stands still."""
    batches, lr = golden.batches, golden.meta["optim"]["lr"]
    steps = iter(range(golden.steps))

    def look_ahead(ahead: LookAhead, **hyper: Any) -> Weights:
        step = next(steps)
        before, after = golden.state("before" if step == 0 else f"state.{step - 1}"), golden.state(f"state.{step}")
        names = {id(param): name for name, param in trainer.model.named_parameters()}
        moved = [(before[names[id(param)]] - after[names[id(param)]]) / lr for param in ahead.params]
        _, rows = ahead.rows(batch_of(trainer, *batches[step % len(batches)]))
        dense = [
            [torch.zeros_like(param) if part is None else part for part, param in zip(row, ahead.params, strict=True)]
            for row in rows
        ]
        jacobian = torch.stack([flat(row) for row in dense]).double()
        moved_by = flat(moved).double()
        weights = torch.linalg.lstsq(jacobian.T, moved_by[:, None]).solution[:, 0]
        assert (weights > 0).all()
        assert abs(weights.sum() - 1) < 1e-3
        return Weights(shared=weights)

    monkeypatch.setattr(trainer.model, "look_ahead", look_ahead)


def _replay_solver(golden: Golden, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CAGrad use the weights that LibMTL's SLSQP stopped at: an exact solver leaves its trajectory."""
    if golden.meta["weighting"] == "MOML":
        _replay_moml(golden, trainer, monkeypatch)
    if golden.meta["weighting"] != "CAGrad":
        return
    recorded = iter(torch.from_numpy(golden.arrays["batch_weight"]).double().flatten(1).unbind(1))

    def update(gram: Tensor, c: float) -> Tensor:
        weights = next(recorded)
        exact = ops.cagrad(gram, c)

        def objective(w: Tensor) -> Tensor:
            return w @ gram.mean(1) + c * gram.mean().sqrt() * (w @ gram @ w).sqrt()

        assert objective(exact) <= objective(weights) * (1 + 1e-9)
        reach = c * gram.mean().sqrt() / (weights @ gram @ weights).sqrt()
        return torch.stack([weights, 1 / len(gram) + reach * weights])

    monkeypatch.setattr(ops, "cagrad_update", update)


def _set_state(model: Any, state: dict[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= set(model.remembered())
    assert not unexpected


def test_all_recorded_runs_are_here() -> None:
    recorded = {path.stem.split("-")[0] for path in RECORDED}
    # LibMTL solves the bargain approximately, so there is no run of it.
    assert recorded == set(WEIGHTINGS) - {"ConFIG", "DualProj", "GO4Align", "MConFIG", "Nash_MTL", "PCD", "SI"}
    assert len(RECORDED) == 52


def test_replays_to_the_end(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    if _detached_encoder(golden):
        pytest.skip("LibMTL does not train the encoder here")
    if golden.meta["rep_grad"] and golden.meta["weighting"] == "GradNorm":
        pytest.skip("LibMTL does not train the encoder in the first epoch")
    trainer, loaders = golden.trainer(), golden.loaders()
    _replay(golden, trainer.model, monkeypatch)
    _replay_solver(golden, trainer, monkeypatch)
    weights = trainer.train(loaders, loaders, golden.meta["epochs"], return_weight=True)
    before, after, got = golden.state("before"), golden.state("after"), trainer.model.state_dict()
    assert [key for key in after if not close(got[key], after[key], before[key])] == []
    if golden.meta["weighting"] not in LOGS_OTHERWISE and "batch_weight" in golden.arrays:
        want = torch.from_numpy(golden.arrays["batch_weight"]).double()
        assert torch.allclose(torch.from_numpy(weights), want, atol=2e-3)


@pytest.mark.parametrize("path", [path for path in PATHS if "GradNorm" in path.stem], ids=lambda path: path.stem)
def test_gradnorm_replays_step_by_step_after_its_first_epoch(path: Path) -> None:
    golden = Golden.read(path)
    trainer, batches = golden.trainer(), golden.batches
    model, scored = trainer.model, []
    for (inputs, labels), name in zip(batches, ["before", "state.0", "state.1"], strict=True):
        _set_state(model, golden.state(name))
        losses, _ = trainer.step.problem.whole(inputs, labels)
        scored.append(torch.stack(losses).detach())
    model.train_loss_buffer = torch.stack(scored).mean(0)[:, None].numpy()
    model.epoch = 1
    model.start_epoch(**golden.meta["weight_args"])
    for step in range(len(batches), golden.steps):
        before, want = golden.state(f"state.{step - 1}"), golden.state(f"state.{step}")
        _set_state(model, before)
        trainer.step([batches[step % len(batches)]], StepBuffer())
        got = model.state_dict()
        assert [key for key in want if not close(got[key], want[key], before[key])] == []


def test_replays_step_by_step(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    if golden.meta["weighting"] not in STATELESS:
        pytest.skip("a step depends on those before")
    trainer = golden.trainer()
    _replay(golden, trainer.model, monkeypatch)
    _replay_solver(golden, trainer, monkeypatch)
    batches = golden.batches
    before = golden.state("before")
    for step in range(golden.steps):
        _set_state(trainer.model, before)
        inputs, labels = batches[step % len(batches)]
        trainer.step([(inputs, labels)], StepBuffer())
        want, got = golden.state(f"state.{step}"), trainer.model.state_dict()
        for key in want:
            if _detached_encoder(golden) and key.startswith("encoder."):
                assert torch.equal(want[key], before[key])
                assert not torch.equal(got[key], before[key])
            else:
                assert close(got[key], want[key], before[key]), (step, key)
        before = want
