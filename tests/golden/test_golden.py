"""LibMTL's recorded training runs, replayed from start to end and one step at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmtl.trainer.records import StepBuffer
from tests.golden.cases import Golden, close

PATHS = sorted(Path(__file__).parent.glob("*.npz"))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.read(request.param)


def _detached_encoder(golden: Golden) -> bool:
    """Whether LibMTL cuts the graph at the representation for a strategy that never closes it: the encoder stays.

    fastmtl trains the encoder there, so only the decoders can agree, and only from one recorded state to the next.
    """
    return golden.meta["rep_grad"] and golden.meta["weighting"] == "EW"


def test_all_recorded_runs_are_here() -> None:
    names = {path.stem.split("-")[0] for path in PATHS}
    assert names == {"EW", "MGDA"}
    assert len(PATHS) == 11


def test_replays_to_the_end(golden: Golden) -> None:
    if _detached_encoder(golden):
        pytest.skip("LibMTL does not train the encoder here")
    trainer, loaders = golden.trainer(), golden.loaders()
    weights = trainer.train(loaders, loaders, golden.meta["epochs"], return_weight=True)
    before, after, got = golden.state("before"), golden.state("after"), trainer.model.state_dict()
    assert all(close(got[key], after[key], before[key]) for key in after)
    assert torch.allclose(
        torch.from_numpy(weights), torch.from_numpy(golden.arrays["batch_weight"]).double(), atol=2e-3
    )


def test_replays_step_by_step(golden: Golden) -> None:
    trainer = golden.trainer()
    batches = golden.batches
    before = golden.state("before")
    for step in range(golden.steps):
        trainer.model.load_state_dict(before)
        inputs, labels = batches[step % len(batches)]
        trainer.step(inputs, labels, StepBuffer())
        want, got = golden.state(f"state.{step}"), trainer.model.state_dict()
        for key in want:
            if _detached_encoder(golden) and key.startswith("encoder."):
                assert torch.equal(want[key], before[key])
                assert not torch.equal(got[key], before[key])
            else:
                assert close(got[key], want[key], before[key]), (step, key)
        before = want
