"""A run outside of the trainer: loaded, exported and checked, predicting files, described by its card."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fastmtl
from fastmtl.cli import main
from fastmtl.data import load as load_data
from fastmtl.deploy import export as exporting
from fastmtl.deploy.facts import TaskFacts
from fastmtl.deploy.predict import said_of
from fastmtl.errors import CheckpointError, FastmtlError, UsageError

QUIET = ["--no-plot", "--no-tensorboard", "--device", "cpu"]
SMALL = ["--encoder", "conv", "--train-size", "64", "--batch-size", "16", "--limit-batches", "3", *QUIET]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--weighting", "uw", *SMALL, "--run-dir", str(folder)]) == 0
    return folder


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


def test_best_and_last_and_what_is_missing(run: Path, tmp_path: Path) -> None:
    best, last = fastmtl.load(run), fastmtl.load(run, checkpoint="last")
    # One epoch: they are the same.
    for one, other in zip(best.parameters(), last.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UsageError, match="There is no run directory"):
        fastmtl.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        fastmtl.load(run, checkpoint="other.pt")
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.json, which `fastmtl train` writes"):
        fastmtl.load(copied)


def test_pt2_with_another_batch_size(run: Path, tmp_path: Path) -> None:
    model = fastmtl.load(run)
    assert exporting.export(model, tmp_path, format="pt2", tasks=["left"])["model.pt2"] <= 1e-5
    program: Any = torch.export.load(tmp_path / "model.pt2").module()
    images = torch.randn(11, 3, 32, 32)
    with torch.no_grad():
        got, wanted = program(images), model(images)
    assert list(got) == ["left"]
    torch.testing.assert_close(got["left"], wanted["left"], rtol=1e-5, atol=1e-5)


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


@pytest.mark.slow
def test_a_program_that_differs_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exporting._write_pt2

    def wrong(program: Any, inputs: Any, path: Path) -> Any:
        call = write(program, inputs, path)
        return lambda given: {task: pred + 1e-3 for task, pred in call(given).items()}

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


def test_predictions_for_a_folder_of_images(run: Path, tmp_path: Path) -> None:
    bundle: Any = load_data("multimnist", n_train=64, encoder="conv")
    pixels = bundle.test.dataset.images[:5]
    for index, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(tmp_path / f"{index}.png")
    assert main(["predict", str(run), str(tmp_path), "--batch-size", "2", "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["input"] for line in lines] == [f"{index}.png" for index in range(5)]
    images, _ = bundle.test.dataset.__getitems__(range(5))
    with torch.no_grad():
        wanted = fastmtl.load(run)(images)
    for task, pred in wanted.items():
        assert [line[task]["class"] for line in lines] == pred.argmax(1).tolist()
        shares = torch.tensor([line[task]["probabilities"] for line in lines])
        torch.testing.assert_close(shares, pred.softmax(1), atol=1e-5, rtol=1e-5)


def test_what_is_said_of_predictions() -> None:
    classes = TaskFacts(kind="classes", outputs=2, labels=("cat", "dog"))
    assert said_of(torch.tensor([0.0, 20.0]), classes)["class"] == "dog"
    assert said_of(torch.tensor([3.0]), TaskFacts(kind="binary", outputs=1))["yes"] is True
    assert said_of(torch.tensor([3.0]), TaskFacts(kind="regression", outputs=1)) == 3
    assert said_of(torch.tensor([3.0, 4.0]), TaskFacts(kind="regression", outputs=2)) == [3, 4]
    assert said_of(torch.zeros(1, 4, 4), TaskFacts(kind="depth", outputs=1)) is None


def test_the_card_is_the_hub_s(run: Path) -> None:
    text = (run / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["library_name"] == "fastmtl"
    (result, _) = about["model-index"][0]["results"]
    assert result["metrics"][0]["type"] == "Acc"
    for line in ("# HPS with UW on multimnist", "| left | Acc | higher |", "model = fastmtl.load(", "CC BY-SA 3.0"):
        assert line in body


DENSE = """
import torch
from fastmtl.data import DatasetInfo, depth, normals, segmentation
from fastmtl.data.images import to_tensor

def row(index):
    generator = torch.Generator().manual_seed(index)
    normal = torch.nn.functional.normalize(torch.randn(3, 12, 16, generator=generator), dim=0)
    labels = {"parts": torch.randint(3, (12, 16), generator=generator).float(), "depth": torch.rand(1, 12, 16)}
    labels["up"] = normal
    return torch.rand(3, 12, 16, generator=generator), labels

def make():
    rows = [row(index) for index in range(8)]
    return DatasetInfo(
        tasks={"parts": segmentation(["wall", "floor", "chair"]), "depth": depth(), "up": normals()},
        load_splits=lambda options: options.splits(train=rows, test=rows[:4], image_size=(12, 16)),
        read_row=lambda row, facts: to_tensor(row["image"], facts["image_size"]),
    )
"""


@pytest.mark.slow
def test_maps_are_drawn_and_written(tmp_path: Path) -> None:
    (tmp_path / "dense.py").write_text(DENSE)
    (tmp_path / "images" / "of").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(2):
        pixels = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "of" / f"{index}.png")
    run = tmp_path / "run"
    words = ["--dataset", f"{tmp_path / 'dense.py'}:make", "--encoder", "conv", "--batch-size", "4", *QUIET]
    assert main(["train", *words, "--run-dir", str(run)]) == 0
    assert main(["predict", str(run), str(tmp_path / "images")]) == 0
    out = run / "predictions"
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "input": "of/1.png",
        "parts": {"map": "of_1.parts.npy"},
        "depth": {"map": "of_1.depth.npy"},
        "up": {"map": "of_1.up.npy"},
    }
    parts, up = np.load(out / "of_1.parts.npy"), np.load(out / "of_1.up.npy")
    assert (parts.shape, parts.dtype, parts.max() < 3) == ((12, 16), np.uint8, True)
    np.testing.assert_allclose(np.linalg.norm(up, axis=0), 1, rtol=1e-5)
    for index in range(2):
        with Image.open(out / f"of_{index}.png") as picture:
            # Four panels beside each other.
            assert picture.size[0] > 3 * picture.size[1] / 2
