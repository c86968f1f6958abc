"""Data with columns: parquet files, folders of Hugging Face's datasets, shards of WebDataset."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmtl.cli import main
from fastmtl.data import Vocabulary, load, read_parquet
from fastmtl.errors import UsageError

TASKS = {"price": "regression", "colour": "classes"}


def _numbers(count: int, seed: int) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    length, width = rng.normal(5, 2, count), rng.normal(-1, 0.5, count)
    return {
        "length": length.tolist(),
        "width": width.tolist(),
        "price": [None, *(3 * length - width)[1:].tolist()],
        "colour": ["red" if value > 5 else "blue" for value in length],
    }


def _first(loader: Any) -> Any:
    return next(iter(loader))


def _parquet(folder: Path, columns: dict[str, list[Any]], name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)


def test_columns_of_numbers_are_standardised_and_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    _parquet(data, _numbers(100, 0), "train-0.parquet")
    _parquet(data, _numbers(60, 1), "train-1.parquet")
    _parquet(data, _numbers(40, 2), "test.parquet")
    bundle = load("parquet", path=data, inputs=["length", "width"], tasks=TASKS, encoder="mlp", batch_size=160)
    inputs, labels = _first(bundle.train)
    assert inputs.shape == (160, 2)
    torch.testing.assert_close(inputs.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert labels["price"].shape == (160, 1)
    assert int(labels["price"].isnan().sum()) == 2
    assert bundle.labels["colour"] == ("blue", "red")
    words = ["--dataset", "parquet", "--dataset-path", str(data), "--inputs", "length,width", "--encoder", "mlp"]
    words += ["--tasks", "price=regression,colour=classes", "--epochs", "30", "--batch-size", "16", "--lr", "1e-2"]
    assert main(["train", *words, "--weighting", "upgrad", "--run-dir", str(run), "--no-plot", "--no-tensorboard"]) == 0
    new = tmp_path / "new.parquet"
    _parquet(tmp_path, {"length": [9.0, 1.0], "width": [-1.0, -1.0]}, "new.parquet")
    assert main(["predict", str(run), str(new), "--out", str(tmp_path / "out")]) == 0
    one, two = (json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines())
    assert (one["colour"]["class"], two["colour"]["class"]) == ("red", "blue")
    assert abs(one["price"] - 28) < 4
    assert abs(two["price"] - 4) < 4


def test_a_folder_of_datasets_has_images_and_texts(blobs: Any, tmp_path: Path) -> None:
    import datasets

    files = sorted(blobs().glob("*.png"))
    rows = {
        "picture": [str(file) for file in files],
        "shape": [index % 2 for index in range(len(files))],
        "title": ["dark" if index % 2 else "light" for index in range(len(files))],
    }
    features = datasets.Features(
        picture=datasets.Image(), shape=datasets.ClassLabel(names=["disc", "square"]), title=datasets.Value("string")
    )
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=whole, test=whole.select(range(4))).save_to_disk(tmp_path / "saved")
    bundle = load(
        "datasets",
        path=tmp_path / "saved",
        inputs=["picture"],
        tasks={"shape": "classes"},
        batch_size=4,
        encoder="conv",
    )
    images, labels = _first(bundle.test)
    assert images.shape == (4, 3, 20, 20)
    assert labels["shape"].tolist() == [0, 1, 0, 1]
    assert bundle.labels["shape"] == ("disc", "square")
    with pytest.raises(UsageError, match="need an encoder of texts"):
        next(
            iter(
                load(
                    "datasets", path=tmp_path / "saved", inputs=["title"], tasks={"shape": "classes"}, batch_size=4
                ).train
            )
        )


def test_shards_of_webdataset(blobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, folder = sorted(blobs().glob("*.png")), tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as archive:
            for index in range(shard * 12, shard * 12 + 12):
                rng = np.random.default_rng(index)
                mask, buffer = rng.integers(0, 3, (20, 20)), io.BytesIO()
                np.save(buffer, mask)
                members = {
                    "png": files[index].read_bytes(),
                    "cls": str(index % 2).encode(),
                    "json": json.dumps({"score": index / 10}).encode(),
                    "mask.npy": buffer.getvalue(),
                }
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{index:04d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    tasks = {
        "kind": {"kind": "classes", "column": "cls"},
        "score": "regression",
        "parts": {"kind": "segmentation", "column": "mask.npy", "outputs": 3},
    }
    bundle = load("webdataset", path=folder, inputs=["png"], tasks=tasks, batch_size=2, encoder="conv")
    assert "so 2 of its 24 rows, drawn with seed 0, are one" in capsys.readouterr().out
    assert bundle.rows == {"train": 22, "test": 2}
    images, labels = _first(bundle.train)
    assert images.shape == (2, 3, 20, 20)
    assert {task: tuple(label.shape) for task, label in labels.items()} == {
        "kind": (2,),
        "score": (2, 1),
        "parts": (2, 20, 20),
    }
    preds = {task: decoder(bundle.encoder_class()(images)) for task, decoder in bundle.decoders().items()}
    assert preds["parts"].shape == (2, 3, 20, 20)


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    data = tmp_path / "data"
    _parquet(data, _numbers(20, 0), "train.parquet")
    for changed, message in (
        ({"inputs": ["lenght"]}, "Did you mean 'length'?"),
        ({"inputs": []}, "needs the columns that are inputs and the tasks"),
        ({"tasks": {"price": "regresion"}}, "Did you mean 'regression'?"),
        ({"tasks": {"cost": "regression"}}, "Unknown column of the task cost"),
        ({"tasks": {"colour": {"kind": "classes", "lables": [1]}}}, "only kind, column, labels and outputs are known"),
        ({"inputs": ["length", "colour"]}, "got text, vector"),
        ({"path": tmp_path}, "has no .parquet files"),
        ({"encoder": "conv", "augment": True}, "aug must be off"),
    ):
        given: dict[str, Any] = {"path": data, "inputs": ["length"], "tasks": TASKS, "encoder": "mlp", "batch_size": 4}
        with pytest.raises(UsageError, match=message):
            load("parquet", **(given | changed))
    with pytest.raises(UsageError, match="are for data with columns"):
        load("multimnist", inputs=["a"])


def test_tables_are_read_by_column(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    table = arrow.table({"user": ["a", "b"], "age": [1.5, None], "seen": [[1, 2, 3], [4]], "click": [0, 1]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    for path in (tmp_path / "rows.parquet", tmp_path):
        columns = read_parquet(path)
        assert list(columns) == ["user", "age", "seen", "click"]
        assert columns["seen"].tolist() == [[1, 2, 3], [4, -1, -1]]
        assert np.isnan(columns["age"]).tolist() == [False, True]
        assert columns["click"].dtype == np.int64
        assert Vocabulary(columns["user"]).encode(columns["user"]).tolist() == [0, 1]
    assert list(read_parquet(tmp_path, ["click"])) == ["click"]
    with pytest.raises(UsageError, match="has no column buy: there are user, age, seen, click"):
        read_parquet(tmp_path, ["buy"])
    (tmp_path / "bad.txt").write_text("no table")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        read_parquet(tmp_path / "bad.txt")


def test_columns_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    from pyarrow import parquet

    _parquet(tmp_path, {"click": [0, 1, 1], "text": ["a", "b", "c"]}, "rows.parquet")
    path = tmp_path / "rows.parquet"
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    begin = chunk.dictionary_page_offset
    content[begin : begin + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    assert read_parquet(path, ["click"])["click"].tolist() == [0, 1, 1]
    assert read_parquet(path, []) == {}
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        read_parquet(path)
