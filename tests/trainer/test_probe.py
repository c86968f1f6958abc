"""Gram matrices beside training: right, and without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmtl.trainer.log.jsonl import JsonlLogger, read_jsonl
from fastmtl.trainer.probe import GramProbe
from tests.trainer.toy import loaders, make_trainer


def test_the_gram_matrix_is_that_of_plain_autograd() -> None:
    trainer = make_trainer("EW")
    train = loaders()
    inputs, labels = next(iter(train))
    gram = GramProbe(trainer.step.problem).gram(inputs, labels)
    preds = trainer.model(inputs)
    rows = []
    for task in trainer.task_name:
        loss = trainer.meter.losses[task].compute_loss(preds[task], labels[task])
        grads = torch.autograd.grad(loss, list(trainer.model.get_share_params()), retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    expected = torch.stack(rows).double() @ torch.stack(rows).double().T
    torch.testing.assert_close(gram.double(), expected, rtol=1e-5, atol=1e-8)


def test_groups_add_up_to_the_whole() -> None:
    trainer = make_trainer("UW")
    train = loaders()
    inputs, labels = next(iter(train))
    probe = GramProbe(trainer.step.problem)
    count = len(trainer.step.problem.shared_params)
    groups = probe.gram(inputs, labels, [place % 2 for place in range(count)])
    assert groups.shape == (2, 2, 2)
    torch.testing.assert_close(groups.sum(0), probe.gram(inputs, labels))


@pytest.mark.parametrize("weighting", ["EW", "FAMO", "GradDrop"])
def test_training_does_not_notice(weighting: str, tmp_path: Path) -> None:
    states = []
    for probed in (False, True):
        torch.manual_seed(0)
        log = tmp_path / f"{probed}.jsonl"
        trainer = make_trainer(weighting, rep_grad=weighting == "GradDrop", logger=JsonlLogger(log), log_every=2)
        if probed:
            trainer.probe = GramProbe(trainer.step.problem)
        trainer.train(loaders(), loaders(), epochs=2)
        states.append(trainer.model.state_dict())
        cosines = [row["cosine"] for row in read_jsonl(log) if row["event"] == "steps" and "cosine" in row]
        assert len(cosines) == (4 if probed else 0)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_task_without_labels_has_no_cosines() -> None:
    trainer = make_trainer("EW")
    train = loaders()
    inputs, labels = next(iter(train))
    missing = {**labels, "task1": torch.full_like(labels["task1"], torch.nan)}
    gram = GramProbe(trainer.step.problem).gram(inputs, missing)
    assert gram[0, 0] > 0
    assert gram[1].isnan().all()
    assert gram[:, 1].isnan().all()
    probe, count = GramProbe(trainer.step.problem), len(trainer.step.problem.shared_params)
    for groups, shape in ((None, (2, 2)), ([place % 2 for place in range(count)], (2, 2, 2))):
        gram = probe.gram(inputs, {}, groups)
        assert gram.shape == shape
        assert gram.isnan().all()
