"""Reviews: a small archive in vaderSentiment's layout becomes splits, numbers of words and a trained network."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl.cli.entry import main
from fastmtl.data import load
from fastmtl.data.reviews import LENGTH, AccF1Metric, Words, prepare_reviews, read_reviews, tokens
from fastmtl.errors import UsageError
from fastmtl.model import LSTMEncoder

WORDS = {"tweets": "phone interview", "movieReviewSnippets": "film plot", "amazonReviewSnippets": "camera battery"}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Return an archive in an archive, with 60 texts of each kind, whose words tell topic and sentiment."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as texts:
        for stem, words in {**WORDS, "nytEditorialSnippets": "senator vote"}.items():
            lines = []
            for row in range(60):
                number = f"{row // 3 + 1}_{row % 3 + 1}" if stem == "amazonReviewSnippets" else str(row + 1)
                rating, feeling = [(-2.1, "awful :("), (0.2, "is a"), (3.0, "great !!!")][row % 3]
                lines.append(f"{number}\t{rating}\t{words} {feeling} number{row} &amp; \u00e9\r\n")
            # A byte-order mark, as one of the files has, and a repeated text.
            content = "\ufeff" + "".join([*lines, lines[0].replace("1", "61", 1)])
            _add(texts, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt", content.encode())
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(path, "w:gz") as outer:
        _add(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def test_documents_stay_together_and_nothing_is_lost(archive: Path, tmp_path: Path) -> None:
    rows = prepare_reviews(tmp_path / "made", archive)
    reviews = read_reviews(tmp_path / "made")
    assert sum(rows.values()) == len(reviews) == 3 * 60
    assert rows["val"] == rows["test"] == 18
    assert {review.topic for review in reviews} == {"tweet", "film", "product"}
    assert sorted({review.sentiment for review in reviews}) == [0, 1, 2]
    assert not any("senator" in review.text or "&amp;" in review.text for review in reviews)
    split_of: dict[int, set[str]] = {}
    for review in reviews:
        if review.topic == "product":
            split_of.setdefault(int(review.text.split("number")[1].split()[0]) // 3, set()).add(review.split)
    assert len(split_of) == 20
    assert all(len(splits) == 1 for splits in split_of.values())
    prepare_reviews(tmp_path / "again", archive)
    assert read_reviews(tmp_path / "again") == reviews


def test_tokens() -> None:
    assert tokens("Don\u2019t WATCH it!!!! :-( 10 of 100... caf\u00e9") == [
        "don't", "watch", "it", "!!", ":-(", "0", "of", "0", "..", "caf"
    ]  # fmt: skip


def test_words_come_from_the_training_texts() -> None:
    words = Words(["good film", "good plot plot", "a good one"], size=4)
    assert words.numbers == {"good": 2, "plot": 3}
    rows = words.encode(["Good unknown plot", "", "good " * 100])
    assert rows.shape == (3, LENGTH)
    assert rows[0, :4].tolist() == [2, 1, 3, 0]
    assert not rows[1].any()
    assert rows[2].eq(2).all()


def test_padding_beyond_the_words_has_no_part_in_the_mean() -> None:
    torch.manual_seed(0)
    encoder = LSTMEncoder(10, embedding_dim=4, hidden_dim=3).eval()
    words = torch.tensor([[2, 3, 4, 0, 0], [0, 0, 0, 0, 0]])
    features = encoder(words)
    states, _ = encoder.lstm(encoder.embedding(words))
    torch.testing.assert_close(features[0], torch.cat([states[0, :3].mean(0), states[0, :3].amax(0)]))
    assert features.shape == (2, encoder.feature_dim)
    assert features[1].isfinite().all()


def test_a_bundle_fits_together(archive: Path, tmp_path: Path) -> None:
    prepare_reviews(tmp_path / "made", archive)
    bundle = load("reviews", path=tmp_path / "made", batch_size=16, n_train=100)
    assert bundle.rows == {"train": 100, "val": 18, "test": 18}
    train: Any = bundle.train
    words, labels = next(iter(train))
    encoder, decoders = bundle.encoder_class(), bundle.decoders()
    for task, spec in bundle.task_dict.items():
        pred = decoders[task](encoder(words))
        assert pred.shape == (16, 3)
        assert torch.isfinite(spec["loss_fn"].compute_loss(pred, labels[task]))


@pytest.mark.slow
def test_the_command_learns_both_tasks(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTMTL_CACHE", str(tmp_path / "cache"))
    train = "train --dataset reviews --epochs 10 --batch-size 16 --optim adam --lr 0.01 --weighting mgda --run-dir run"
    assert main(train.split()) == 2
    assert "get it with fastmtl data prepare reviews." in capsys.readouterr().err
    assert main(["data", "prepare", "reviews", "--archive", str(archive)]) == 0
    assert main(train.split()) == 0
    capsys.readouterr()
    assert main(["eval", "run", "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert all(min(scores["Acc"], scores["F1"]) > 0.8 for scores in tasks.values())


def test_what_is_no_archive_is_named(archive: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tar.gz"
    with tarfile.open(other, "w:gz") as made:
        _add(made, "readme", b"")
    for path in (other, tmp_path / "missing.tar.gz"):
        with pytest.raises(UsageError, match="must be vaderSentiment's source distribution"):
            prepare_reviews(tmp_path / "made", path)
    prepare_reviews(tmp_path / "made", archive)
    (tmp_path / "made" / "reviews.tsv").write_text("changed\n")
    with pytest.raises(UsageError, match="damaged: recreate it"):
        read_reviews(tmp_path / "made")
    with pytest.raises(UsageError, match="aug must be off"):
        load("reviews", path=tmp_path / "made", augment=True)


class _Group:
    """Two processes: this one, and one that has a metric of its own."""

    def __init__(self, other: AccF1Metric) -> None:
        self.others = iter(other._kept.values())

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, value]

    def all_reduce_optional(self, tensor: Tensor | None) -> Tensor | None:
        other = next(self.others)
        assert tensor is not None
        assert other is not None
        return tensor + other


def test_scores_of_texts_are_those_of_all_processes() -> None:
    pred, labels = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    whole, here, there = (AccF1Metric(3) for _ in range(3))
    whole.update_fun(pred, labels)
    here.update_fun(pred[:25], labels[:25])
    there.update_fun(pred[25:], labels[25:])
    here.sync(_Group(there))
    assert here.score_fun() == pytest.approx(whole.score_fun())
    assert here.score_fun() != there.score_fun()
