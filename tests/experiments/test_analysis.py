"""Which tasks agree and which conflict: from the log, and from a look at a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastmtl import Trainer
from fastmtl.cli import main
from fastmtl.errors import UsageError
from fastmtl.experiments.analysis import groups_of, look_at, section_of
from fastmtl.experiments.reading import read_run
from fastmtl.trainer.log.logger import pair_names
from tests.experiments.made import make_data, write_run


def _trainer() -> Trainer:
    torch.manual_seed(0)
    problem = make_data(0)
    decoders: Any = problem.decoders
    return Trainer(
        problem.task_dict,
        "EW",
        "HPS",
        problem.encoder_class,
        decoders(),
        False,
        False,
        {"optim": "sgd", "lr": 0.1},
        None,
        device="cpu",
    )


def test_tasks_that_agree_are_grouped() -> None:
    tasks = ["a", "b", "c", "d"]
    cosines = dict.fromkeys(pair_names(tasks), -0.2) | {"a:b": 0.5, "c:d": 0.1}
    assert groups_of(tasks, cosines) == [["a", "b"], ["c", "d"]]
    assert groups_of(tasks, dict.fromkeys(cosines, 0.2)) == [tasks]
    assert groups_of(tasks, dict.fromkeys(cosines, -0.2)) == [[task] for task in tasks]


def test_layers_are_those_of_plain_autograd() -> None:
    trainer = _trainer()
    data = make_data(0)
    batches = list(DataLoader(data.train.dataset, batch_size=8))[:2]
    look = look_at(trainer, batches, 2)
    trainer.model.train()
    grams: dict[str, torch.Tensor] = {}
    for inputs, labels in batches:
        preds = trainer.model(inputs)
        losses = [trainer.meter.losses[task].compute_loss(preds[task], labels[task]) for task in trainer.task_name]
        for name, module in trainer.model.named_modules():
            own = list(module.parameters(recurse=False))
            if not name.startswith("encoder") or not own:
                continue
            rows = [torch.autograd.grad(loss, own, retain_graph=True) for loss in losses]
            flat = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows]).double()
            grams[name] = grams.get(name, 0) + flat @ flat.T
    grams["all"] = sum(grams.values())  # type: ignore[assignment]
    assert list(look.cosines.index) == list(grams)
    for name, gram in grams.items():
        expected = (gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()).item()
        assert look.cosines.loc[name, "kind:size"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_few_common_examples_are_warned_of(tmp_path: Path) -> None:
    batches = [(inputs, dict(labels)) for inputs, labels in make_data(0).train]
    for _, labels in batches:
        labels["size"][2:] = torch.nan
    look = look_at(_trainer(), batches, 2)
    assert look.shared == {"kind:size": 0.25}
    run = read_run(write_run(tmp_path / "run", gram=np.array([[1.0, -0.5], [-0.5, 4.0]])))
    text = " ".join(section_of(run, look).text)
    assert "fewer than 30% of the labelled examples are common to kind:size" in text
    complete = replace(look, shared={"kind:size": 0.4})
    assert "Warning" not in " ".join(section_of(run, complete).text)
    run.config["multi_input"] = True
    assert "each task has examples of its own" in " ".join(section_of(run, None).text)


def test_the_log_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", weighting="MGDA", gram=np.array([[1.0, -0.5], [-0.5, 4.0]]))
    assert main(["analyze", str(run), "--out", str(tmp_path / "report")]) == 0
    told = capsys.readouterr().out
    assert "kind and size, mean cosine -0.250, steps in conflict 100 %" in told
    assert "Suggested groups by mean cosine (the training log): kind; size." in told
    assert (tmp_path / "report" / "analysis.html").read_text().count("<img") == 2


def test_what_cannot_be_analyzed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, single = write_run(tmp_path / "ew"), write_run(tmp_path / "stl", arch="STL")
    for path, sentence in (
        (plain, "has no cosines of task gradients in its log, as EW needs no gradients"),
        (single, "is of STL, which shares nothing"),
        (tmp_path / "absent", "There is no run directory"),
    ):
        assert main(["analyze", str(path), "--out", str(tmp_path / "report")]) == 2
        assert sentence in capsys.readouterr().err
    trainer = _trainer()
    trainer.step.problem.shared_params = []
    with pytest.raises(UsageError, match="shares nothing between tasks"):
        look_at(trainer, [], 1)
