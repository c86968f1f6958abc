"""`fastmtl predict`: what is said of predictions, which files it writes, where it finds its inputs."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastmtl
from fastmtl.cli import main
from fastmtl.data import load as load_data
from fastmtl.deploy import pictures
from fastmtl.deploy.facts import TaskFacts
from fastmtl.deploy.predict import predict, said_of
from fastmtl.errors import UsageError

QUIET = ["--no-plot", "--no-tensorboard", "--device", "cpu"]
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


def _pictures(folder: Path, names: Sequence[str]) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(folder / name)


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    (folder / "dense_of_test.py").write_text(DENSE)
    words = ["--dataset", f"{folder / 'dense_of_test.py'}:make", "--encoder", "conv", "--batch-size", "4", *QUIET]
    assert main(["train", *words, "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_maps_are_drawn_and_written(dense_run: Path, tmp_path: Path) -> None:
    _pictures(tmp_path / "images" / "of", ["0.png", "1.png"])
    out = tmp_path / "out"
    assert main(["predict", str(dense_run), str(tmp_path / "images"), "--out", str(out)]) == 0
    assert _lines(out)[1] == {
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
    assert said_of(torch.tensor([0.0, -3.0]), TaskFacts(kind="binary", outputs=2)) == {
        "probability": [0.5, pytest.approx(0.04742587)],
        "yes": [True, False],
    }
    assert said_of(torch.tensor([3.0]), TaskFacts(kind="regression", outputs=1)) == 3
    assert said_of(torch.tensor([3.0, 4.0]), TaskFacts(kind="regression", outputs=2)) == [3, 4]


def test_what_is_no_number_is_null() -> None:
    nothing = torch.tensor([math.nan])
    assert said_of(nothing, TaskFacts(kind="regression", outputs=1)) is None
    assert said_of(nothing, TaskFacts(kind="binary", outputs=1)) == {"probability": None, "yes": None}
    said = said_of(torch.tensor([math.nan, 0.0]), TaskFacts(kind="classes", outputs=2))
    assert said == {"class": None, "probability": None, "probabilities": [None, None]}


def test_inputs_of_one_name_have_files_of_their_own(dense_run: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    names = ["7.jpg", "7.png", "a/b.png", "a_b.png"]
    _pictures(photos, names)
    assert main(["predict", str(dense_run), str(photos), "--tasks", "depth", "--out", str(out)]) == 0
    maps = {line["input"]: np.load(out / line["depth"]["map"]) for line in _lines(out)}
    assert sorted(maps) == names
    model = fastmtl.load(dense_run)
    for name, found in maps.items():
        with Image.open(photos / name) as image:
            wanted = model.predict([{"image": image}], ["depth"])["depth"][0, 0]
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=1e-5)
    assert len(list(out.glob("*.png"))) == len(names)


def test_pictures_of_an_earlier_call_are_no_inputs(dense_run: Path, tmp_path: Path) -> None:
    _pictures(tmp_path, ["1.png", "2.png"])
    before = (tmp_path / "1.png").read_bytes()
    for _ in range(2):
        assert main(["predict", str(dense_run), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
        assert [line["input"] for line in _lines(tmp_path / "out")] == ["1.png", "2.png"]
    for inputs in (tmp_path, tmp_path / "1.png"):
        with pytest.raises(UsageError, match="out must be another folder than that of the inputs"):
            predict(fastmtl.load(dense_run), inputs, tmp_path)
    assert (tmp_path / "1.png").read_bytes() == before


def _shard(path: Path, rows: Sequence[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for index, row in enumerate(rows):
            for extension, content in row.items():
                member = tarfile.TarInfo(f"{index}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_paths_in_a_table_begin_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, new, run, out = (tmp_path / name for name in ("data", "new", "run", "out"))
    _pictures(data, [f"{index}.png" for index in range(4)])
    mask = io.BytesIO()
    np.save(mask, np.arange(24 * 32).reshape(24, 32) % 2)
    rows = [{"png": (data / f"{index}.png").read_bytes(), "mask.npy": mask.getvalue()} for index in range(4)]
    _shard(data / "train.tar", rows)
    _shard(data / "test.tar", rows[:2])
    (tmp_path / "train.yaml").write_text(
        "dataset: webdataset\ninputs: png\nencoder: conv\nbatch_size: 2\n"
        "tasks: {parts: {kind: segmentation, column: mask.npy, outputs: 2}}\n"
    )
    words = ["--config", "train.yaml", "--dataset-path", "data", "--run-dir", "run"]
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words, *QUIET]) == 0
    assert str(tmp_path) not in (run / "model.json").read_text()
    assert (
        "Inputs are images of 24 x 32 pixels from 0 to 1, less the mean 0.485, 0.456" in (run / "README.md").read_text()
    )
    # A folder with other images of the same names, as those of the training may lie elsewhere by then.
    _pictures(new, ["other.png", "0.png"])
    (new / "rows.jsonl").write_text(json.dumps({"png": "0.png"}) + "\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["eval", str(run)]) == 0
    assert main(["train", "--resume", str(run), "--dataset-path", "../data", "--epochs", "2"]) == 0
    shown: list[Any] = []

    def show(image: Any) -> np.ndarray:
        shown.append(np.asarray(image))
        return shown[-1]

    monkeypatch.setattr(pictures, "_shown", show)
    assert main(["predict", str(run), str(new / "rows.jsonl"), "--out", str(out)]) == 0
    model = fastmtl.load(run)
    with Image.open(new / "0.png") as image:
        wanted = model.predict([{"png": image}])["parts"][0].argmax(0)
        np.testing.assert_array_equal(shown[0], np.asarray(image))
    np.testing.assert_array_equal(np.load(out / _lines(out)[0]["parts"]["map"]), wanted.numpy())
    assert model.read([{"png": "0.png"}], new).shape == (1, 3, 24, 32)
    with pytest.raises(UsageError, match=r"The image '0\.png' cannot be read"):
        model.read([{"png": "0.png"}])


def test_images_of_a_table_are_opened_for_the_read_row_of_a_data_set(dense_run: Path, tmp_path: Path) -> None:
    _pictures(tmp_path, ["a.png"])
    model = fastmtl.load(dense_run)
    wanted = model.read([{"image": Image.open(tmp_path / "a.png")}])
    for given in ("a.png", (tmp_path / "a.png").read_bytes(), {"bytes": None, "path": "a.png"}):
        torch.testing.assert_close(model.read([{"image": given}], tmp_path), wanted, rtol=0, atol=0)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png"}))
    assert main(["predict", str(dense_run), str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "0.png").exists()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"img": "a.png"}, "A row has no column 'image', which is an input, only img."),
        ({"image": 3}, "An image must be a PIL image, bytes or a path, got a int."),
        ({"image": "missing.png"}, "missing.png' cannot be read"),
    ],
)
def test_rows_that_cannot_be_read_leave_nothing_behind(
    dense_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert main(["predict", str(dense_run), str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_panels_of_one_size_begin_at_one_height(tmp_path: Path) -> None:
    tasks = {
        "parts": TaskFacts(kind="segmentation", outputs=2, labels=("a", "b")),
        "depth": TaskFacts(kind="depth", outputs=1, labels=()),
    }
    maps = {"parts": np.zeros((16, 16), dtype=np.uint8), "depth": np.linspace(1, 2, 256).reshape(16, 16)}
    pictures.draw(tmp_path / "a.png", Image.new("RGB", (16, 16)), maps, tasks)
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    width = pixels.shape[1]
    # In the middle of each panel, beside its title.
    tops = [int((pixels[:, round(width * middle)] < 250).argmax()) for middle in (1 / 6, 1 / 2, 5 / 6)]
    assert max(tops) - min(tops) <= 2, tops
