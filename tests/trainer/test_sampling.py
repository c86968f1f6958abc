"""Steps of some tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmtl.errors import UsageError
from fastmtl.trainer.log.jsonl import JsonlLogger, read_jsonl
from fastmtl.trainer.log.records import StepBuffer
from fastmtl.trainer.tasks import TaskSampler
from fastmtl.utils import set_random_seed
from fastmtl.weighting import WEIGHTINGS
from tests.host_reads import NoHostRead
from tests.trainer.toy import flat, loaders, make_trainer


def _trainer(name: str, **options: Any) -> Any:
    options = {"count": 4, "tasks_per_step": 2, "rep_grad": WEIGHTINGS[name].needs == "reps"} | options
    return make_trainer(name, **options)


@pytest.mark.parametrize(("count", "per_step"), [(4, 2), (5, 2), (5, 3), (7, 4), (3, 1), (6, 5)])
def test_all_tasks_come_up_equally_often(count: int, per_step: int) -> None:
    sampler = TaskSampler(count, per_step)
    seen = np.zeros(count, dtype=int)
    for _ in range(10 * count):
        drawn = sampler.draw()
        assert len(set(drawn)) == per_step
        assert drawn == sorted(drawn)
        seen[drawn] += 1
        assert seen.max() - seen.min() <= 2
    assert (seen == 10 * per_step).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WEIGHTINGS))
def test_the_other_tasks_stay_as_they_are(name: str) -> None:
    trainer = _trainer(name, optim_param={"optim": "adam", "lr": 1e-2})
    model = trainer.model
    model.epoch, model.epochs = 0, 1
    batches = [next(iter(loaders(4)))] * trainer.step.batches
    for _ in range(4):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        buffer = StepBuffer()
        losses, _ = trainer.step(batches, buffer)
        assert len(losses) == 2
        idle = [t for t, task in enumerate(trainer.task_name) if task not in losses]
        assert buffer._steps[0].losses.isnan().nonzero().flatten().tolist() == idle
        for key, value in model.state_dict().items():
            if any(key.startswith(f"decoders.task{t}.") for t in idle):
                assert torch.equal(value, before[key]), key
            if model.task_dims.get(key) == (0,):
                assert torch.equal(value[idle], before[key][idle]), key
        assert not all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    assert model.task_num == 4
    with NoHostRead():
        trainer.step(batches, StepBuffer())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MGDA", "FairGrad", "MoCo", "GradVac", "FAMO", "EW", "UW", "ExcessMTL"])
@pytest.mark.parametrize("multi_input", [False, True], ids=["single", "multi"])
def test_trains_logs_and_resumes(name: str, multi_input: bool, tmp_path: Path) -> None:
    data = loaders(4, multi_input=multi_input)

    def run(epochs: int, **more: Any) -> torch.Tensor:
        trainer = _trainer(name, multi_input=multi_input, **more)
        if "resume" not in more:
            set_random_seed(5)
        trainer.train(data, data, epochs)
        return flat([*trainer.model.parameters(), *trainer.model.buffers()])

    run(1, save_path=str(tmp_path))
    resumed = run(3, resume=str(tmp_path / "last.pt"))
    assert torch.equal(resumed, run(3))


def test_a_step_of_two_tasks_is_that_of_a_trainer_of_two() -> None:
    sampled, two = _trainer("MGDA"), make_trainer("MGDA", count=2)
    sampled.step.sampler.left = [1, 0, 3, 2]
    state = sampled.model.state_dict()
    two.model.load_state_dict({key: state[key] for key in two.model.state_dict()})
    x, labels = next(iter(loaders(4)))
    sampled.step([(x, labels)], StepBuffer())
    two.step([(x, labels)], StepBuffer())
    after = sampled.model.state_dict()
    for key, value in two.model.state_dict().items():
        torch.testing.assert_close(after[key], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks_per_step": 5}, "must be at most 4, the number of tasks"),
        ({"tasks_per_step": 0}, "must be at least 1"),
        ({"compile": True}, "compile"),
        ({"weight_momentum": 0.5}, "weight_momentum"),
        ({"update_weights_every": 2}, "update_weights_every"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    options = dict(options)
    with pytest.raises(UsageError, match=message):
        _trainer(options.pop("name", "MGDA"), **options)


@pytest.mark.parametrize(("count", "per_step"), [(3, 2), (4, 3)])
def test_the_logged_share_of_conflicts_is_that_of_the_pairs_in_the_step(
    count: int, per_step: int, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    trainer = _trainer("MGDA", count=count, tasks_per_step=per_step, log_every=1, logger=JsonlLogger(path))
    trainer.train(loaders(count, rows=160), loaders(count), 1)
    rows = [row for row in read_jsonl(path) if row["event"] == "steps"]
    assert len(rows) == 20
    shares = set()
    for row in rows:
        cosines = [cosine for cosine in row["cosine"].values() if cosine is not None]
        assert len(cosines) == per_step * (per_step - 1) // 2
        shares.add(row["conflict"]["share"])
        assert row["conflict"]["share"] == pytest.approx(sum(cosine < 0 for cosine in cosines) / len(cosines))
    assert len(shares) > 1
