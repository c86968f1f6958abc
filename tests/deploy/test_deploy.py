"""A run outside of the trainer: loaded, exported and checked, predicting files, described by its card."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastmtl
from fastmtl.cli import main
from fastmtl.data import load as load_data
from fastmtl.deploy import export as exporting
from fastmtl.errors import FastmtlError, UsageError

QUIET = ["--no-plot", "--no-tensorboard", "--device", "cpu"]


def test_a_loaded_model_scores_what_the_run_did(run: Path) -> None:
    model = fastmtl.load(run)
    bundle: Any = load_data("multimnist", n_train=64, encoder="conv")
    right = torch.zeros(2)
    rows = 0
    with torch.no_grad():
        for images, labels in islice(bundle.test, 3):
            predictions = model(images)
            right += torch.tensor([(predictions[t].argmax(1) == labels[t]).sum() for t in ("left", "right")])
            rows += len(images)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (test,) = [line for line in lines if line["event"] == "epoch" and line["mode"] == "test"]
    wanted = [test["metric"][task]["Acc"] for task in ("left", "right")]
    assert (right / rows).tolist() == pytest.approx(wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(images, ["right"])["right"], predictions["right"])


def test_pt2_with_another_batch_size(run: Path, tmp_path: Path) -> None:
    model = fastmtl.load(run)
    assert exporting.export(model, tmp_path, format="pt2", tasks=["left"])["model.pt2"] <= 1e-5
    program: Any = torch.export.load(tmp_path / "model.pt2").module()
    images = torch.randn(11, 3, 32, 32)
    with torch.no_grad():
        got, wanted = program(images), model(images)
    assert list(got) == ["left"]
    torch.testing.assert_close(got["left"], wanted["left"], rtol=1e-5, atol=1e-5)


HARD = """
import torch
from torch import nn
from fastmtl.architecture import HPS

class Hard(HPS):
    # One of two experts, chosen by what has no gradient.
    def _make_network(self):
        super()._make_network()
        self.gate, self.first = nn.Linear(3, 2), nn.Linear(3, 64)
        self.second, self.idle = nn.Linear(3, 64), nn.Linear(3, 64)

    def trunk(self, inputs, task_name=None):
        (features,) = super().trunk(inputs, task_name)
        means = inputs.mean((2, 3))
        chosen = self.gate(10 * means).argmax(1)[:, None]
        expert = torch.where(chosen == 0, self.first(means), self.second(means))
        return (features + expert[:, :, None, None],)
"""


def test_what_has_no_gradient_is_exported_and_what_nothing_reads_is_not(tmp_path: Path) -> None:
    (tmp_path / "hard_of_test.py").write_text(HARD)
    words = ["--arch", f"{tmp_path / 'hard_of_test.py'}:Hard", "--encoder", "conv", "--limit-batches", "2", *QUIET]
    assert main(["train", *words, "--run-dir", str(tmp_path / "run")]) == 0
    model = fastmtl.load(tmp_path / "run")
    exporting.export(model, tmp_path, format="pt2")
    program: Any = torch.export.load(tmp_path / "model.pt2")
    images = torch.randn(64, 3, 32, 32) + torch.randn(64, 3, 1, 1)
    with torch.no_grad():
        assert set(model.network.gate(10 * images.mean((2, 3))).argmax(1).tolist()) == {0, 1}
        got, wanted = program.module()(images), model(images)
    for task, pred in wanted.items():
        torch.testing.assert_close(got[task], pred, rtol=1e-5, atol=1e-5)
    held = set(program.state_dict)
    assert any("gate" in name for name in held)
    assert not any("idle" in name for name in held)


EIGHT = """
import torch
from torch import nn
from fastmtl.data import DatasetInfo, classes

ROWS = [(text, {"mood": torch.tensor(index % 2)}) for index, text in enumerate(["good", "very bad"] * 4)]

class Encoder(nn.Module):
    # Reads eight letters, no more and no less.
    feature_dim = 4

    def __init__(self):
        super().__init__()
        self.letters, self.layer = nn.Embedding(256, 3), nn.Linear(24, 4)

    def tokenize(self, texts):
        padded = [[*text.encode()[:8], *[0] * (8 - len(text))] for text in texts]
        return {"letters": torch.tensor(padded)}

    def forward(self, inputs):
        return self.layer(self.letters(inputs["letters"]).flatten(1))

def make():
    return DatasetInfo(
        tasks={"mood": classes(["good", "bad"])},
        load_splits=lambda options: options.splits(train=ROWS, test=ROWS),
        read_row=lambda row, facts: row["text"],
    )
"""


def test_a_model_of_texts_of_one_length_is_exported_for_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "eight_of_test.py"
    file.write_text(EIGHT)
    words = ["--dataset", f"{file}:make", "--encoder", f"{file}:Encoder", "--batch-size", "4", *QUIET]
    assert main(["train", *words, "--run-dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 0
    assert "model.pt2: for texts of 8 tokens alone" in capsys.readouterr().out
    model = fastmtl.load(tmp_path / "run")
    inputs = model.read([{"text": text} for text in ("good", "bad", "very good")])
    program: Any = torch.export.load(tmp_path / "run" / "export" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(inputs)["mood"], model(inputs)["mood"])


def test_backbone_and_heads_apart(run: Path, tmp_path: Path) -> None:
    model = fastmtl.load(run)
    written = exporting.export(model, tmp_path, format="pt2", parts="apart")
    assert set(written) == {"backbone.pt2", "head-left.pt2", "head-right.pt2"}
    programs: Any = {name: torch.export.load(tmp_path / name) for name in written}
    held = {name: {tuple(value.shape) for value in program.state_dict.values()} for name, program in programs.items()}
    assert held["head-left.pt2"] == {(10, 64), (10,)}
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = programs["backbone.pt2"].module()(images)
        for task, pred in model(images).items():
            torch.testing.assert_close(
                programs[f"head-{task}.pt2"].module()(features)[task], pred, rtol=1e-5, atol=1e-5
            )


def test_safetensors_load_without_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    assert main(["export", str(run), "--format", "safetensors", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.yaml", "model.json", "README.md"}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one, other = fastmtl.load(run)(images), fastmtl.load(out)(images)
    assert all(torch.equal(one[task], other[task]) for task in one)


def test_the_files_beside_exported_weights_are_theirs(run: Path, tmp_path: Path) -> None:
    text = (run / "README.md").read_text()
    assert "## Metrics after epoch 0, the best one" in text
    longer, out = tmp_path / "longer", tmp_path / "out"
    words = ["--encoder", "conv", "--train-size", "64", "--limit-batches", "2", "--run-dir", str(longer), *QUIET]
    # Such a learning rate makes the first epoch the best.
    assert main(["train", "--epochs", "2", "--lr", "10", *words]) == 0
    exporting.export(fastmtl.load(longer, checkpoint="last"), out, format="safetensors")
    card = (out / "README.md").read_text()
    rows = [json.loads(line) for line in (longer / "metrics.jsonl").read_text().splitlines()]
    scores = {row["epoch"]: row["metric"]["left"]["Acc"] for row in rows if row.get("mode") == "test"}
    assert "## Metrics after epoch 1, the last one" in card
    about = yaml.safe_load(card.split("---\n", 2)[1])
    assert about["model-index"][0]["results"][0]["metrics"][0]["value"] == scores[1]
    # Weights from elsewhere, into the folder of the others: nothing of these stays.
    exporting.export(fastmtl.load(run, checkpoint=str(longer / "best.pt")), out, format="safetensors")
    card = (out / "README.md").read_text()
    assert "its weights are not those of the run" in card
    assert "## Metrics" not in card
    assert not yaml.safe_load(card.split("---\n", 2)[1])["model-index"][0]["results"]
    assert yaml.safe_load((out / "config.yaml").read_text())["weighting"] == "UW"
    again = tmp_path / "again"
    exporting.export(fastmtl.load(out), again, format="safetensors")
    assert (again / "README.md").read_text() == card
    with pytest.raises(UsageError, match=r"holds a run \(last\.pt\)"):
        exporting.export(fastmtl.load(run), longer, format="safetensors")


def test_a_program_that_differs_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(program: Any, inputs: Any, path: Path) -> Any:
        path.touch()
        return lambda given: {task: pred + 1e-3 for task, pred in program.module()(given).items()}

    monkeypatch.setattr(exporting, "_write_pt2", wrong)
    with pytest.raises(FastmtlError, match=r"model.pt2 differs from the model by 0\.001 with 1 rows"):
        exporting.export(fastmtl.load(run), tmp_path, format="pt2")
    assert not (tmp_path / "model.pt2").exists()


def test_mistakes_of_export_and_predict(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"image": 1}\n[]\n')
    (tmp_path / "notes.txt").write_text("")
    for words, message in (
        (["export", str(run), "--format", "onx"], "Did you mean 'onnx'?"),
        (["export", str(run), "--tasks", "lft"], "Did you mean 'left'?"),
        (["export", str(run), "--format", "safetensors", "--tasks", "left"], "leave out tasks and parts"),
        (["predict", str(run), str(tmp_path / "empty")], "has no images"),
        (["predict", str(run), str(tmp_path / "nothing")], "There is no file or folder"),
        (["predict", str(run), str(tmp_path / "bad.jsonl")], "bad.jsonl:2 must be an object"),
        (["predict", str(run), str(tmp_path / "notes.txt")], "must be a folder of images"),
        (["predict", str(run), str(tmp_path / "empty"), "--batch-size", "0"], "batch_size must be at least 1"),
    ):
        assert main(words) == 2, words
        assert message in capsys.readouterr().err


def test_the_card_is_the_hub_s(run: Path) -> None:
    text = (run / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["library_name"] == "fastmtl"
    (result, _) = about["model-index"][0]["results"]
    assert result["metrics"][0]["type"] == "Acc"
    for line in ("# HPS with UW on multimnist", "| left | Acc | higher |", "model = fastmtl.load(", "CC BY-SA 3.0"):
        assert line in body
