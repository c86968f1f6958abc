"""Data sets of columns, read from shards, which need no further package: what is said of tasks, what is missing."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtl.data import DatasetInfo, binary, classes, load
from fastmtl.data.column_sets import _Labels, read_row
from fastmtl.data.loading import _default_workers
from fastmtl.errors import UsageError

ROWS = [{"length": index / 2, "width": -index, "price": 3.0 * index, "colour": index % 2} for index in range(8)]
FACTS: dict[str, Any] = {"kind": "vector", "inputs": ["length", "width"], "mean": [1.0, 2.0], "std": [2.0, 4.0]}


def _shard(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for index, row in enumerate(rows):
            content = json.dumps(row).encode()
            member = tarfile.TarInfo(f"{index}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _load(folder: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "path": folder,
        "inputs": ["length", "width"],
        "tasks": {"price": "regression"},
        "encoder": "mlp",
        "batch_size": 4,
    }
    return load("webdataset", **(given | changes))


def test_inputs_are_standardised_with_the_training_rows(tmp_path: Path) -> None:
    _shard(tmp_path / "train.tar", ROWS)
    _shard(tmp_path / "test.tar", ROWS[:3])
    bundle = _load(tmp_path, batch_size=8)
    inputs, labels = next(iter(bundle.train))
    torch.testing.assert_close(inputs.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(2))
    assert labels["price"].shape == (8, 1)
    assert bundle.facts["width"] == 2


def test_an_input_without_a_value_is_refused(tmp_path: Path) -> None:
    assert read_row({"length": 3, "width": 2}, FACTS).tolist() == [1.0, 0.0]
    for row, message in (
        ({"length": 3.0}, "has no column 'width', which is an input"),
        ({"length": 3.0, "width": None}, "'width' is an input and has no value in a row"),
        ({"length": float("nan"), "width": 1}, "'length' is an input and has nan in a row"),
        ({"length": "long", "width": 1}, "'length' must have numbers or lists of numbers, got 'long'"),
        ({"length": [1, 2], "width": 1}, "has 3 numbers as inputs in place of the 2"),
    ):
        with pytest.raises(UsageError, match=message):
            read_row(row, FACTS)
    with pytest.raises(UsageError, match="'title' is an input and has no value"):
        read_row({"title": None}, {"kind": "text", "inputs": ["title"]})
    _shard(tmp_path / "train.tar", [*ROWS, {**ROWS[0], "width": None}])
    with pytest.raises(UsageError, match="'width' is an input and has no value in a row"):
        _load(tmp_path)


def test_missing_labels_are_marked_as_the_losses_know_them() -> None:
    tasks = {
        "a": {"kind": "classes", "column": "a", "labels": ["x", "y"]},
        "b": {"kind": "regression", "column": "b", "outputs": 2},
        **{kind: {"kind": kind, "column": kind, "outputs": 2} for kind in ("segmentation", "depth", "normals")},
    }
    labels = _Labels(tasks, (2, 3), Path())(dict.fromkeys(("a", "b", "segmentation", "depth", "normals")))
    assert labels["a"] == -100
    assert labels["b"].isnan().tolist() == [True, True]
    assert (labels["segmentation"].shape, labels["segmentation"].unique().tolist()) == ((2, 3), [-1])
    assert (labels["depth"].shape, labels["depth"].unique().tolist()) == ((1, 2, 3), [0])
    assert (labels["normals"].shape, labels["normals"].unique().tolist()) == ((3, 2, 3), [0])


def test_what_a_task_cannot_have_is_refused(tmp_path: Path) -> None:
    _shard(tmp_path / "train.tar", ROWS)
    for about, message in (
        ({"kind": "regression", "labels": ["a", "b"]}, "'labels', which is for classes or segmentation"),
        ({"kind": "classes", "outputs": 3}, "is classes and has 'outputs', which is for segmentation"),
        ({"kind": "binary", "outputs": 2}, "is binary and has 'outputs'"),
        ({"kind": "classes", "labels": "ab"}, "must be a list of names, got 'ab'"),
        ({"kind": "segmentation", "outputs": "13"}, "must be a number of classes from 2 on, got '13'"),
        ({"kind": "segmentation", "labels": ["a", "b"], "outputs": 3}, "has 2 labels, but outputs is 3"),
        ({"kind": "segmentation"}, "needs its number of classes"),
    ):
        with pytest.raises(UsageError, match=message):
            _load(tmp_path, tasks={"price": about})


def test_more_training_rows_than_there_are_is_refused(tmp_path: Path) -> None:
    _shard(tmp_path / "train.tar", ROWS)
    _shard(tmp_path / "test.tar", ROWS[:2])
    assert _load(tmp_path, n_train=5).rows["train"] == 5
    with pytest.raises(UsageError, match="train_size must be at most the 8 rows there are, got 9"):
        _load(tmp_path, n_train=9)


def test_files_that_are_named_after_no_split_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _shard(tmp_path / "one" / "train.tar", ROWS)
    _shard(tmp_path / "one" / "tset.tar", ROWS)
    assert sum(_load(tmp_path / "one").rows.values()) == 8
    assert "not read, as not named after a split: tset.tar" in capsys.readouterr().out
    _shard(tmp_path / "two" / "a.tar", ROWS)
    _shard(tmp_path / "two" / "holdout.tar", ROWS)
    assert sum(_load(tmp_path / "two").rows.values()) == 16
    assert "no file is named after a split, so that all 2 are training data" in capsys.readouterr().out
    _shard(tmp_path / "three" / "train.tar", ROWS)
    _shard(tmp_path / "three" / "test.tar", ROWS)
    _load(tmp_path / "three")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tasks", [{"a": binary(), "b": classes(3)}, lambda facts: {"a": binary()}])
def test_workers_of_a_data_set_whose_tasks_are_given(tasks: Any) -> None:
    info = DatasetInfo(load_splits=lambda options: options, tasks=tasks, multi_input=True)  # type: ignore[return-value]
    assert 0 <= _default_workers(info, pin_memory=True) <= 4
