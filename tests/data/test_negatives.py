"""Sampling of negatives, and probabilities of all rows from those of a sample."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastmtl.cli import main
from fastmtl.data import (
    DATASETS,
    ClickRows,
    Columns,
    DatasetInfo,
    LoaderOptions,
    NegativeSampler,
    Splits,
    load,
    regression,
    unsampled,
)
from fastmtl.data.negatives import Negatives, labels_of
from fastmtl.data.tensors import batch_loader
from fastmtl.distributed import Alone, shard
from fastmtl.errors import UsageError
from fastmtl.loss import BCELoss
from fastmtl.metrics import AUCMetric
from tests.trainer.test_resume import InterruptAt
from tests.trainer.toy import flat, make_trainer


def _sampler(ones: list[int], rows: int, ratio: float, seed: int = 0) -> NegativeSampler:
    labels = torch.zeros(rows, 1)
    labels[ones] = 1
    return NegativeSampler(labels, ratio, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("ratio", "drawn"), [(1, 3), (2.5, 8), (0.2, 1), (17 / 3, 17)])
def test_an_epoch_has_all_positives_and_some_negatives(ratio: float, drawn: int) -> None:
    sampler = _sampler([2, 3, 11], 20, ratio)
    epochs = [list(sampler) for _ in range(50)]
    for rows in epochs:
        assert len(rows) == len(set(rows)) == len(sampler) == 3 + drawn
        assert {2, 3, 11} <= set(rows)
    assert sampler.rate == drawn / 17
    assert len({tuple(rows) for rows in epochs}) > 40
    counts = torch.bincount(torch.tensor(epochs).flatten(), minlength=20)
    # Each negative is drawn about as often as another: five standard deviations.
    spread = math.sqrt(50 * sampler.rate * (1 - sampler.rate))
    assert all(abs(counts[row] - 50 * sampler.rate) <= 5 * spread for row in range(20) if row not in (2, 3, 11))
    assert list(_sampler([2, 3, 11], 20, ratio)) == epochs[0]
    assert list(_sampler([2, 3, 11], 20, ratio, seed=1)) != epochs[0]


@pytest.mark.parametrize(
    ("labels", "ratio", "message"),
    [
        (torch.tensor([1.0, 0, math.nan]), 1, "need a label of 0 or 1 in every row, and 1 rows have none"),
        (torch.zeros(4), 1, "of which the 4 rows have none"),
        (torch.tensor([1.0, 0, 0]), 3, "1 positives and 2 negatives.*at most 2, got 3"),
        (torch.tensor([1.0, 0, 0]), 0.1, "above 0"),
        (torch.zeros(4, 2), 1, "one label for each row"),
    ],
    ids=str,
)
def test_refused(labels: Tensor, ratio: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NegativeSampler(labels, ratio, torch.Generator())


@pytest.mark.parametrize("given", [{"click": 0}, {"click": True}, {"click": "4"}, {"a": 1, "b": 2}, {"a": math.inf}])
def test_ratios_are_numbers_of_one_task(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="negatives"):
        Negatives.of(given)


class _Peer(Alone):
    """One of two processes, as far as loaders see it."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.size = rank, 2


def test_processes_have_parts_of_the_same_batches() -> None:
    rows = Columns({"row": torch.arange(90)}, {"click": (torch.arange(90) % 9 == 0).float()})

    def loader() -> DataLoader[Any]:
        sampler = NegativeSampler(labels_of(rows, "click"), 3, torch.Generator().manual_seed(4))
        return batch_loader(rows, 8, sampler=sampler)

    whole = [inputs["row"] for inputs, _ in loader()]
    parts = [[inputs["row"] for inputs, _ in shard(loader(), _Peer(rank))] for rank in range(2)]
    assert [len(each) for each in (whole, *parts)] == [5, 5, 5]
    for batch, one, two in zip(whole, *parts, strict=True):
        assert batch[::2].tolist() == one.tolist()
        assert batch[1::2].tolist() == two.tolist()


def test_a_resumed_run_draws_the_same_rows(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    table = Columns({"x": torch.randn(60, 6, generator=generator)}, {"task1": torch.ones(60, 1)})
    table.labels["task1"][:40] = 0

    class Rows(Columns):
        def __getitems__(self, indices: Any) -> Any:
            inputs, labels = super().__getitems__(indices)
            return inputs["x"], labels

    def trainer(**more: Any) -> Any:
        task = {"metrics": ["AUC"], "metrics_fn": AUCMetric(), "loss_fn": BCELoss(), "weight": [1]}
        torch.manual_seed(0)
        decoders = nn.ModuleDict({"task1": nn.Linear(8, 1)})
        return make_trainer("EW", task_dict={"task1": task}, decoders=decoders, log_every=1, **more)

    def data() -> DataLoader[Any]:
        rows = Rows(table.inputs, table.labels)
        return batch_loader(
            rows, 8, sampler=NegativeSampler(rows.labels["task1"], 1.2, torch.Generator().manual_seed(1))
        )

    test = batch_loader(Rows(table.inputs, table.labels), 60)
    whole = trainer()
    whole.train(data(), test, 3)
    first = trainer(save_path=str(tmp_path), logger=InterruptAt(7))
    with pytest.raises(KeyboardInterrupt):
        first.train(data(), test, 3)
    resumed = trainer(resume=str(tmp_path / "last.pt"))
    resumed.train(data(), test, 3)
    assert torch.equal(flat(whole.model.parameters()), flat(resumed.model.parameters()))


def test_probabilities_of_all_rows() -> None:
    """The best predictions of a sample are its shares, which are corrected to those of all rows."""
    rows = ClickRows(60_000, users=3, items=2)
    _, labels = rows.__getitems__(range(len(rows)))
    click, conversion = labels["click"].flatten().double(), labels["conversion"].flatten().double()
    sampler = NegativeSampler(click, 0.5, torch.Generator().manual_seed(0))
    drawn = torch.tensor([row for _ in range(40) for row in sampler])
    of_click, of_conversion = click[drawn].mean(), conversion[drawn].mean()
    assert of_click > 2 * click.mean()
    torch.testing.assert_close(unsampled(of_click, sampler.rate), click.mean())
    torch.testing.assert_close(unsampled(of_conversion, sampler.rate, of_click), conversion.mean(), rtol=2e-3, atol=0)
    shares = torch.rand(50, dtype=torch.float64)
    odds = shares / (shares + (1 - shares) / 0.1)
    torch.testing.assert_close(unsampled(shares, 0.1), odds)
    torch.testing.assert_close(unsampled(shares, 1.0, shares.flip(0)), shares)
    with pytest.raises(UsageError, match="rate must be above 0"):
        unsampled(shares, 0.0)
    with pytest.raises(UsageError, match="one shape"):
        unsampled(shares, 0.5, shares[:, None])


def test_data_sets_of_tables_take_them(capsys: pytest.CaptureFixture[str]) -> None:
    bundle = load("clicks", n_train=2000, negatives={"Click": 0.5}, encoder="clicks")
    train: Any = bundle.train
    test: Any = bundle.test
    census: Any = load("census-income", negatives={"income": 1}).train
    sampler = train.sampler
    assert isinstance(sampler, NegativeSampler)
    labels = ClickRows(2000, first=2**40).__getitems__(range(2000))[1]["click"]
    assert len(sampler.positives) == int(labels.sum())
    assert bundle.rows["train"] == 2000
    assert bundle.facts["negatives"]["rate"] == sampler.rate
    assert "all " + str(len(sampler.positives)) in capsys.readouterr().out
    batches = torch.cat([labels["click"] for _, labels in train])
    assert batches.mean() == pytest.approx(2 / 3, abs=0.05)
    assert not isinstance(test.sampler, NegativeSampler)
    assert isinstance(census.sampler, NegativeSampler)
    with pytest.raises(UsageError, match="income"):
        load("census-income", negatives={"click": 1})
    with pytest.raises(UsageError, match="need a label of 0 or 1 in every row"):
        load("multimnist", negatives={"left": 1})


def test_data_sets_that_make_loaders_of_their_own_do_not() -> None:
    """They would have all negatives without a word."""
    rows: Any = [(torch.zeros(3), {"size": torch.ones(1)})] * 4

    def load_splits(options: LoaderOptions) -> Splits:
        loader: Any = DataLoader(rows, batch_size=2)
        return Splits(train=loader, val=None, test=loader, rows={"train": 4, "test": 4})

    def load_rows(options: LoaderOptions) -> Splits:
        return options.splits(rows, rows)

    for number, made in enumerate((load_splits, load_rows)):
        info = DatasetInfo(name=f"own{number}", load_splits=made, tasks={"size": regression(1)}, batch_size=2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(DATASETS, info.name, info)
            with pytest.raises(UsageError, match="for tables with labels by task"):
                load(info.name, negatives={"size": 1})


def test_a_sampler_of_ones_own_draws_training_rows_and_no_negatives() -> None:
    rows: Any = [(torch.zeros(3), {"size": torch.ones(1)})] * 4
    sampler = _sampler([0, 1], 4, ratio=1)
    options = LoaderOptions(batch_size=2, test_batch_size=3, seed=0)
    assert options.loader(rows, "train", sampler=sampler).sampler is sampler
    for split in ("val", "test"):
        with pytest.raises(UsageError, match=f"A sampler draws the rows of train, those of {split} come in order"):
            options.loader(rows, split, sampler=sampler)
    drawn = LoaderOptions(batch_size=2, test_batch_size=3, seed=0, negatives=Negatives("size", 1))
    with pytest.raises(UsageError, match="negatives must be off where the rows of train are drawn by a sampler"):
        drawn.loader(rows, "train", sampler=sampler)


@pytest.mark.slow
def test_the_command_trains_and_tells_of_the_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = ["--dataset", "clicks", "--negatives", "click=0.5", "--train-size", "600", "--batch-size", "64"]
    assert main(["train", *words, "--limit-batches", "3", "--run-dir", str(run), "--no-plot", "--no-tensorboard"]) == 0
    rate = json.loads((run / "model.json").read_text())["data"]["negatives"]["rate"]
    row = {"user": 3, "item": 5, "group": 1, "watched": [4], "price": 0.2}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["predict", str(run), str(tmp_path / "rows.jsonl")]) == 0
    assert f"a share {rate:.4g} of the negatives of click" in capsys.readouterr().out
