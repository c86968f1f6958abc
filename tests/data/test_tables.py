"""Tables: columns, vocabularies, Parquet, and the data sets made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastmtl import load as load_run
from fastmtl.cli import main
from fastmtl.data import ClickRows, Columns, Vocabulary, given, load, number_files, read_parquet
from fastmtl.data.clicks import ITEMS, WATCHED
from fastmtl.data.tables import _LOGARITHMS, _census, census, census_features, read_aliexpress
from fastmtl.deploy.export import export
from fastmtl.errors import UsageError
from fastmtl.metrics import AUCMetric
from fastmtl.model import FeatureEncoder


def _area(scores: torch.Tensor, labels: torch.Tensor) -> float:
    metric = AUCMetric()
    metric.update_fun(scores, labels.flatten())
    return metric.score_fun()[0]


def test_rows_are_fetched_at_once() -> None:
    rows = Columns({"a": torch.arange(5), "b": torch.ones(5, 2)}, {"task": torch.arange(5.0)})
    inputs, labels = rows.__getitems__([3, 0])
    assert inputs["a"].tolist() == [3, 0]
    assert inputs["b"].shape == (2, 2)
    assert labels["task"].tolist() == [3, 0]
    assert rows[2][0]["a"] == 2
    assert len(rows) == 5
    with pytest.raises(UsageError, match=r"must have one length.*'a': 5, 'task': 4"):
        Columns({"a": torch.arange(5)}, {"task": torch.ones(4)})


def test_a_label_counts_where_another_is_1() -> None:
    labels = {"click": torch.tensor([1, 0, 1]), "conversion": torch.tensor([1, 0, 0])}
    masked = given(labels, {"conversion": "click"})
    assert masked["conversion"].isnan().tolist() == [False, True, False]
    assert masked["conversion"][[0, 2]].tolist() == [1, 0]
    assert masked["click"] is labels["click"]
    unknown = given({**labels, "click": torch.tensor([torch.nan, 1, 1])}, {"conversion": "click"})
    assert unknown["conversion"].isnan().tolist() == [True, False, False]
    with pytest.raises(UsageError, match="labels of view, there are those of click, conversion"):
        given(labels, {"conversion": "view"})
    with pytest.raises(UsageError, match="must have one shape"):
        given({**labels, "click": torch.ones(3, 1)}, {"conversion": "click"})


def test_values_are_numbered_by_frequency() -> None:
    words = Vocabulary(["b", "a", "b", "c", "a", "b"], most=2, unseen=3)
    assert words.known.tolist() == ["b", "a"]
    assert words.size == 5
    numbers = words.encode([["a", "b"], ["zebra", "a"]])
    assert numbers.shape == (2, 2)
    assert numbers[0].tolist() == [1, 0]
    assert 2 <= int(numbers[1, 0]) < 5
    # crc32, not Python's hash, which differs from process to process.
    assert words.encode(["x", "yy", "zzz"]).tolist() == [2, 4, 4]
    assert Vocabulary(torch.tensor([7, 7, 9])).encode(torch.tensor([9, 7, 8])).tolist() == [1, 0, 2]
    # A value of another kind is not known.
    assert Vocabulary([1, 2]).encode(["1"]).tolist() == [2]
    for make, message in (
        (lambda: Vocabulary(["a"], most=0), "most of a vocabulary must be at least 1"),
        (lambda: Vocabulary([0.5]), "texts or integers, got float64"),
        (lambda: Vocabulary(np.array(["a", None], dtype=object)), "got a missing value"),
    ):
        with pytest.raises(UsageError, match=message):
            make()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.int8, np.int64])
def test_integers_of_all_kinds_are_numbered_by_value(dtype: Any) -> None:
    numbers = Vocabulary(np.array([7, 7, 9], dtype=dtype))
    assert numbers.encode(np.array([9, 7, 8], dtype=dtype)).tolist() == [1, 0, 2]
    for other in (np.int64, np.uint16):
        assert numbers.encode(np.array([9, 7, 8], dtype=other)).tolist() == [1, 0, 2]
    assert numbers.encode(["7"]).tolist() == [2]


def test_large_unsigned_numbers_stay_apart() -> None:
    large = np.array([2**63 + 1, 2**63, 2**63], dtype=np.uint64)
    numbers = Vocabulary(large)
    assert numbers.encode(large).tolist() == [1, 0, 0]
    assert numbers.encode(np.array([-(2**63), 1])).tolist() == [2, 2]


def test_booleans_are_0_and_1() -> None:
    values = Vocabulary([True, False, True], unseen=100)
    for column in ([False, True], [0, 1], np.array([0, True], dtype=object), torch.tensor([False, True])):
        assert values.encode(column).tolist() == [1, 0]
    mixed = Vocabulary(np.array([True, 2, 2], dtype=object), unseen=100)
    assert mixed.encode([2, 1]).tolist() == [0, 1]
    # Not known here, they have one number too.
    assert torch.equal(Vocabulary([5], unseen=100).encode([True]), Vocabulary([5], unseen=100).encode([1]))


def test_a_missing_parquet_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"Parquet files need pyarrow .*pip install pyarrow"):
        read_parquet("rows.parquet")


@pytest.mark.parametrize(("name", "shares"), [("census-income", (0.062, 0.433)), ("census-education", (0.149, 0.433))])
def test_the_census(name: str, shares: tuple[float, float]) -> None:
    train, test = census(name, "train"), census(name, "test")
    assert (len(train), len(test)) == (20_000, 10_000)
    for label, share in zip(train.labels.values(), shares, strict=True):
        assert float(label.mean()) == pytest.approx(share, abs=0.01)
    # What the labels are made of is no feature, of any task.
    assert {"income", "marital_status"}.isdisjoint(train.inputs)
    assert ("education" in train.inputs) == (name == "census-income")
    encoder = FeatureEncoder(census_features(name))
    vectors = encoder.stem(train.__getitems__(range(2_000))[0]).detach()
    # Numbers are near mean 0 and standard deviation 1.
    assert vectors[:, 0].mean().abs() < 0.2
    assert vectors[:, 0].std() == pytest.approx(1, abs=0.2)
    assert torch.isfinite(vectors).all()


@pytest.mark.parametrize("name", ["census-income", "census-education", "clicks"])
def test_a_bundle_fits_together(name: str) -> None:
    bundle = load(name, batch_size=32, n_train=64)
    loaders: Any = bundle.train
    inputs, labels = next(iter(loaders))
    features = bundle.encoder_class()(inputs)
    assert features.shape == (32, bundle.feature_dim)
    for task, head in bundle.decoders().items():
        loss = bundle.task_dict[task]["loss_fn"].compute_loss(head(features), labels[task])
        assert loss.isfinite()
    assert bundle.rows["train"] == 64
    with pytest.raises(UsageError, match="aug must be off"):
        load(name, augment=True)


def test_the_census_takes_no_folder_and_has_so_many_rows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes no dataset_path"):
        load("census-income", path=tmp_path)
    with pytest.raises(UsageError, match="at most the 20000 training rows"):
        load("census-income", n_train=20_001)


def test_clicks_are_drawn_with_their_probabilities() -> None:
    rows, indices = ClickRows(10**12), torch.arange(200_000) * 4_999_999
    inputs, labels = rows.__getitems__(indices)
    known = rows.probabilities(indices)
    for task in ("click", "conversion"):
        assert float(labels[task].mean()) == pytest.approx(float(known[task].mean()), abs=0.003)
        # Among the rows that are called probable as many come true.
        top = known[task] > known[task].quantile(0.9)
        assert float(labels[task][top].mean()) == pytest.approx(float(known[task][top].mean()), abs=0.01)
        assert 0.6 < _area(known[task], labels[task]) < 0.95
    assert bool((labels["conversion"] <= labels["click"]).all())
    assert 0 <= int(inputs["item"].min()) <= int(inputs["item"].max()) < ITEMS
    assert inputs["watched"].shape == (200_000, WATCHED)
    # A power law: half of what is seen are few items.
    assert float((inputs["item"] < 250).double().mean()) == pytest.approx(0.51, abs=0.03)


def test_clicks_depend_on_number_and_seed_alone() -> None:
    one, same, other = ClickRows(100), ClickRows(50, first=10), ClickRows(100, seed=1)
    assert torch.equal(one.__getitems__([15, 20])[0]["user"], same.__getitems__([5, 10])[0]["user"])
    assert not torch.equal(one.__getitems__(range(9))[0]["user"], other.__getitems__(range(9))[0]["user"])
    assert len(one) == 100
    assert one[3][0]["watched"].shape == (WATCHED,)


@pytest.mark.parametrize("rho", [-0.8, 0.0, 0.9])
def test_the_dependence_of_clicks_and_conversions_is_known(rho: float) -> None:
    rows = ClickRows(20_000, rho=rho)
    known = rows.probabilities(range(20_000))
    logits = torch.stack([known["click"].logit(), known["conversion after click"].logit()])
    # The taste is a part of the first alone.
    common = 2 * 0.6**2
    expected = rho * common / ((common + 2 * 0.5**2) * common) ** 0.5
    assert float(torch.corrcoef(logits)[0, 1]) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"rows": 1, "first": -1}, "first must be at least 0"),
        ({"rows": 1, "rho": 1.5}, "rho must be from -1 to 1"),
    ],
)
def test_clicks_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ClickRows(**options)


def write_aliexpress(folder: Path, split: str, rows: int) -> None:
    generator = np.random.default_rng(rows)
    names = ["index", *(f"c{k}" for k in range(16)), "n0", "n1", "click", "conversion"]
    lines = [
        [row, *generator.integers(0, 9, 16), *generator.normal(size=2).round(3), *generator.integers(0, 2, 2)]
        for row in range(rows)
    ]
    text = "\n".join(",".join(map(str, line)) for line in [names, *lines])
    (folder / f"{split}.csv").write_text(text + "\n")


def test_aliexpress_in_the_layout_of_mtreclib(tmp_path: Path) -> None:
    for split, rows in (("train", 40), ("test", 20)):
        write_aliexpress(tmp_path, split, rows)
    bundle = load("aliexpress", path=tmp_path, batch_size=8, n_train=32)
    assert bundle.rows == {"train": 32, "test": 20}
    loaders: Any = bundle.train
    inputs, labels = next(iter(loaders))
    assert inputs["numbers"].shape == (8, 2)
    assert set(labels) == {"click", "conversion"}
    assert bundle.encoder_class()(inputs).shape == (8, bundle.feature_dim)
    of_recipe = load("aliexpress", path=tmp_path, batch_size=8, encoder="aliexpress-mtreclib")
    encoder = of_recipe.encoder_class()
    assert encoder(inputs).shape == (8, of_recipe.feature_dim) == (8, 256)
    assert {table.weight.shape[1] for table in encoder.stem.tables.values()} == {128}
    assert [module.p for module in encoder.modules() if isinstance(module, nn.Dropout)] == [0.2]
    (tmp_path / "test.csv").unlink()
    with pytest.raises(UsageError, match=r"has no file test\.csv"):
        load("aliexpress", path=tmp_path, batch_size=8)


ONES = ",".join("1" * 20)
# Text of a file, and what is said of it.
NO_IMPRESSIONS = {
    "index,a,b\n0,1,2\n": "must have an index, 16 columns of categories.*got 3 columns, fewer than 19",
    "index,a,b\n0,x,2\n": "must be numbers with commas.*'x' in the line '0,x,2'",
    "": "must be numbers with commas.*it is empty",
    "index,a,b\n": "must be numbers with commas.*it has no rows",
    "index,a,b\n0,,2\n": "must be numbers with commas",
    "index,a,b\n0,1,2\n0,1\n": "must be numbers with commas",
    "index,a,b\n0,1\n0,1\n": "must be numbers with commas.*'0,1'... has 2 values below 3 names",
    f"{','.join('a' * 20)}\n{','.join('1' * 16)},1.5,1,0,1\n": "categories.*row 1 has 1.5 in",
    f"{','.join('a' * 20)}\n{','.join('1' * 16)},-1,1,0,1\n": "categories.*row 1 has -1 in",
    f"{','.join('a' * 20)}\n{','.join('1' * 16)},nan,1,0,1\n": "categories.*row 1 has nan in",
    "\n".join([",".join(map(str, range(20))), *[ONES] * 9, ONES.replace("1", "2.5", 2)]): "row 10 has 2.5 in .*'1'",
}


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_impressions_are_those_that_numpy_reads_whole(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(number_files, "_ROWS", 7)
    write_aliexpress(tmp_path, "train", 40)
    path = tmp_path / "train.csv"
    want = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1))
    # Neither an empty line is a row, nor is the end of the last one needed.
    text = path.read_text().replace("\n7,", "\n\n7,").rstrip()
    path.write_bytes(text.replace("\n", ends).encode())
    rows = read_aliexpress(tmp_path, "train")
    assert torch.equal(torch.stack([rows.inputs[f"category{k}"] for k in range(16)], 1), want[:, 1:17].long())
    assert torch.equal(rows.inputs["numbers"], want[:, 17:19].float())
    assert torch.equal(torch.cat([rows.labels["click"], rows.labels["conversion"]], 1), want[:, 19:].float())


@pytest.mark.parametrize("text", NO_IMPRESSIONS)
def test_files_without_impressions(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_files, "_ROWS", 7)
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(UsageError, match=NO_IMPRESSIONS[text]):
        read_aliexpress(tmp_path, "test")


def _row(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the row of columns that has these inputs."""
    row: dict[str, Any] = {column: value.tolist() for column, value in inputs.items()}
    if name == "clicks":
        return {**row, "watched": [item for item in row["watched"] if item >= 0]}
    if name == "aliexpress":
        return row
    _, categories = _census()
    amounts = {column: round(math.expm1(row[column])) for column in _LOGARITHMS}
    names = {column: categories[column][value] for column, value in row.items() if column in categories}
    return row | amounts | names


@pytest.mark.parametrize("name", ["census-income", "census-education", "clicks", "aliexpress"])
def test_a_run_predicts_rows_of_features_by_name(name: str, tmp_path: Path) -> None:
    words = ["--dataset", name, "--limit-batches", "2", "--batch-size", "16", "--train-size", "40"]
    if name == "aliexpress":
        for split, count in (("train", 40), ("test", 20)):
            write_aliexpress(tmp_path, split, count)
        words += ["--dataset-path", str(tmp_path)]
    words += ["--run-dir", str(tmp_path / "run"), "--no-plot", "--no-tensorboard", "--device", "cpu"]
    assert main(["train", *words]) == 0
    given = {"path": tmp_path} if name == "aliexpress" else {}
    bundle: Any = load(name, n_train=40, batch_size=16, **given)
    inputs, _ = bundle.test.dataset.__getitems__(range(8))
    rows = [_row(name, {column: values[index] for column, values in inputs.items()}) for index in range(8)]
    model = load_run(tmp_path / "run")
    for column, values in model.read(rows).items():
        torch.testing.assert_close(values, inputs[column], rtol=1e-5, atol=1e-6)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    with torch.no_grad():
        wanted = model(inputs)
    for task, pred in wanted.items():
        said = torch.tensor([line[task]["probability"] for line in lines])
        torch.testing.assert_close(said, pred.sigmoid().flatten(), rtol=1e-4, atol=1e-5)
    assert export(model, tmp_path, format="pt2")["model.pt2"] <= 1e-5
    column = next(iter(rows[0]))
    with pytest.raises(UsageError, match=f"A row has no value of the column '{column}'"):
        model.read([{**rows[0], column: None}])
    with pytest.raises(UsageError, match=f"The column '{column}' "):
        model.read([{**rows[0], column: "nonsense"}])
