"""The data set parquet, read by groups of rows: rows, order, resumed runs, and what cannot be read so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmtl import Trainer
from fastmtl.cli import main
from fastmtl.data import column_sets, load, streamed
from fastmtl.distributed import Alone, shard
from fastmtl.errors import UsageError
from tests.trainer.test_resume import InterruptAt
from tests.trainer.toy import flat

TASKS = {"price": "regression", "colour": "classes", "bought": "binary"}


def _write(file: Path, rows: int, seed: int, group: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    price: list[Any] = rng.normal(size=rows).tolist()
    colour: list[Any] = rng.choice(["red", "blue"], rows).tolist()
    price[1] = colour[2] = None
    table = pa.table(
        {
            "a": 1e3 + rng.normal(size=rows),
            "b": [list(pair) for pair in rng.normal(size=(rows, 2))],
            "price": price,
            "colour": colour,
            "bought": rng.integers(0, 2, rows),
        }
    )
    pq.write_table(table, file, row_group_size=group)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Rows of three groups at a time are mixed: 10 of 28 bytes, of which a class has 8.
    monkeypatch.setattr(streamed, "_HELD_BYTES", 1000)
    data = tmp_path / "data"
    data.mkdir()
    _write(data / "train-0.parquet", 50, 0, 8)
    _write(data / "train-1.parquet", 33, 1, 10)
    _write(data / "test.parquet", 20, 2, 6)
    return data


def _load(folder: Path, stream: bool | None = True, **options: Any) -> Any:
    given = {"inputs": ["a", "b"], "tasks": TASKS, "encoder": "mlp", "batch_size": 8} | options
    return load("parquet", path=folder, stream=stream, **given)


def _rows(loader: Any) -> torch.Tensor:
    batches = [torch.cat([x, *(y[task].reshape(len(x), 1) for task in TASKS)], 1) for x, y in loader]
    return torch.cat(batches).nan_to_num(-7)


def _sorted(rows: torch.Tensor) -> torch.Tensor:
    return rows[rows[:, 0].argsort()]


def test_rows_are_those_of_the_files_read_whole(folder: Path) -> None:
    groups, whole = _load(folder, batch_size=1), _load(folder, stream=False, batch_size=1)
    assert groups.train.sampler.mixed == 3
    assert groups.rows == whole.rows == {"train": 83, "test": 20}
    for name in ("mean", "std"):
        torch.testing.assert_close(torch.tensor(groups.facts[name]), torch.tensor(whole.facts[name]))
    assert groups.labels["colour"] == whole.labels["colour"] == ("blue", "red")
    first, second = _rows(groups.train), _rows(groups.train)
    assert not torch.equal(first, second)
    # Deviations of numbers far from zero are exact too.
    inputs = first[:, :3]
    torch.testing.assert_close(inputs.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-3)
    for rows in (first, second):
        torch.testing.assert_close(_sorted(rows), _sorted(_rows(whole.train)))
    torch.testing.assert_close(_rows(groups.test), _rows(whole.test))
    assert int((first == -7).sum()) == int((first == -100).sum()) == 2


def test_an_epoch_reads_each_group_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, seen = _load(folder, n_train=70), list[int]()
    real = streamed.ParquetGroups.group

    def group(self: streamed.ParquetGroups, number: int, names: Any) -> Any:
        seen.append(number)
        return real(self, number, names)

    monkeypatch.setattr(streamed.ParquetGroups, "group", group)
    assert len(_rows(loader.train)) == 64
    # 70 rows are those of the first file, and of two groups of the second.
    assert sorted(seen) == list(range(9))


def test_what_is_held_has_so_many_bytes_as_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Of two values, which dictionaries make a fraction of the tensors.
    rng = np.random.default_rng(0)
    table = pa.table({name: rng.integers(0, 2, 20_000) for name in ("a", "b", "bought", "colour")})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet", row_group_size=1000)
    assert pq.read_metadata(tmp_path / "train.parquet").row_group(0).total_byte_size < 2000
    limit = 105_000
    monkeypatch.setattr(streamed, "_HELD_BYTES", limit)
    loader: Any = _load(tmp_path, tasks={"bought": "binary", "colour": "classes"}).train
    for _ in loader:
        pass
    groups = loader.dataset._groups.values()
    assert len(groups) == loader.sampler.mixed == 5
    # Two inputs and a label of 4 bytes, and a class of 8.
    assert sum(values.nbytes for group in groups for part in group for values in part.values()) == 100_000 <= limit


def test_the_first_row_is_read_once_and_only_what_is_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[list[str]]()
    real = streamed.group_of_rows

    def group_of_rows(file: Path, group: int, columns: list[str]) -> Any:
        seen.append(sorted(columns))
        return real(file, group, columns)

    monkeypatch.setattr(streamed, "group_of_rows", group_of_rows)
    _load(folder, tasks={"bought": {"kind": "binary"}})
    # For the kinds of the inputs, for means and deviations, and for the bytes of a row of tensors.
    assert seen == [["a", "b"], *[["a", "b"]] * 11, ["bought"]]


def test_classes_have_the_same_names_read_whole(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The first group has numbers alone, the second a missing one, the third one that is none.
    values = [0.1, 0.2, 0.1, 0.2, 0.1, None, 0.1, float("nan")]
    table = pa.table({"a": [float(row) for row in range(8)], "mark": pa.array(values, pa.float32())})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet", row_group_size=[2, 4][split == "test"])
    loaded: list[Any] = [
        _load(tmp_path, stream, inputs=["a"], tasks={"mark": "classes"}, batch_size=1) for stream in (True, False)
    ]
    assert loaded[0].labels == loaded[1].labels == {"mark": ("0.10000000149011612", "0.20000000298023224")}
    for data in loaded:
        marks = torch.cat([y["mark"] for _, y in data.test])
        assert marks.tolist() == [0, 1, 0, 1, 0, -100, 0, -100]


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_have_parts_of_the_same_batches(folder: Path, workers: int) -> None:
    class Peer(Alone):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.size = rank, 2

    whole = [x for x, _ in _load(folder).train]
    for rank in range(2):
        parts = [x for x, _ in shard(_load(folder, num_workers=workers).train, Peer(rank))]
        assert len(parts) == len(whole)
        assert all(torch.equal(part, batch[rank::2]) for part, batch in zip(parts, whole, strict=True))


def _train(folder: Path, **options: Any) -> torch.Tensor:
    data = _load(folder)
    torch.manual_seed(0)
    trainer = Trainer(
        task_dict=data.task_dict,
        weighting="UPGrad",
        architecture="HPS",
        encoder_class=data.encoder_class,
        decoders=data.decoders(),
        rep_grad=False,
        multi_input=False,
        optim_param={"optim": "sgd", "lr": 0.05},
        scheduler_param=None,
        device="cpu",
        log_every=1,
        **options,
    )
    trainer.train(data.train, data.test, 2)
    return flat(trainer.model.parameters())


def test_a_run_that_ends_within_an_epoch_goes_on_to_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _train(folder, save_path=str(tmp_path / "run"), logger=InterruptAt(13))
    assert torch.equal(_train(folder, resume=str(tmp_path / "run")), _train(folder))


def test_what_is_chosen_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _load(folder, stream=None)
    assert "read" not in capsys.readouterr().out
    monkeypatch.setattr(column_sets, "STREAMED_BYTES", 100)
    _load(folder, stream=None)
    assert "11 groups of up to 10 training rows, of which the rows of 3 at a time are mixed" in capsys.readouterr().out
    assert _load(folder, stream=None, negatives={"bought": 0.5}).facts["negatives"]["task"] == "bought"
    assert "are read into memory: negatives are drawn from all rows" in capsys.readouterr().out
    words = ["--dataset", "parquet", "--dataset-path", str(folder), "--inputs", "a,b", "--encoder", "mlp"]
    words += ["--tasks", "price=regression", "--epochs", "1", "--batch-size", "8", "--no-plot", "--no-tensorboard"]
    assert main(["train", *words, "--stream", "--run-dir", str(folder.parent / "run")]) == 0
    assert "is read as it is needed" in capsys.readouterr().out


def test_what_cannot_be_read_by_groups_is_refused(folder: Path) -> None:
    for options, message in (
        ({"inputs": ["colour"], "tasks": {"bought": "binary"}}, "inputs are images or texts"),
        ({"negatives": {"bought": 1}}, "negatives are drawn from all rows"),
        ({"n_train": 84}, "train_size must be at most the 83 rows"),
    ):
        with pytest.raises(UsageError, match=message):
            _load(folder, **options)
    (folder / "test.parquet").unlink()
    with pytest.raises(UsageError, match=r"stream must be off for .*: it has no test split"):
        _load(folder)
    assert _load(folder, stream=False).rows == {"train": 75, "test": 8}
    with pytest.raises(UsageError, match="stream is for the data set parquet, not clicks"):
        load("clicks", stream=True)
