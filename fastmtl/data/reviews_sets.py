"""Sentiment and topic of short texts, by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.data.digits import SPLITS
from fastmtl.data.registry import DatasetInfo, Loader, LoaderOptions, Splits, Task, register
from fastmtl.data.reviews import SENTIMENTS, TOPICS, Texts, Words, default_folder, read_reviews
from fastmtl.errors import UsageError
from fastmtl.loss import CELoss
from fastmtl.metrics import AbsMetric, AccMetric, F1Metric
from fastmtl.support.running import Group

__all__ = ["AccF1Metric", "text_task"]

_OUTPUTS = {"sentiment": len(SENTIMENTS), "topic": len(TOPICS)}


class AccF1Metric(AbsMetric):
    """Accuracy and macro-averaged F1 score of predictions ``(batch, classes)``.

    Args:
        num_classes: The number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self._both = (AccMetric(), F1Metric(num_classes))

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Take in one batch."""
        for each in self._both:
            each.update_fun(pred, gt)

    def score_fun(self) -> list[float]:
        """Return ``[accuracy, F1]``."""
        return [score for each in self._both for score in each.score_fun()]

    def reinit(self) -> None:
        """Forget all batches."""
        super().reinit()
        for each in self._both:
            each.reinit()

    def sync(self, peers: Group) -> None:
        """Take in what the other processes know."""
        super().sync(peers)
        for each in self._both:
            each.sync(peers)


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
    loaders: dict[str, Loader] = {}
    for split, rows in by_split.items():
        labels = {
            "sentiment": torch.tensor([row.sentiment for row in rows]),
            "topic": torch.tensor([topics[row.topic] for row in rows]),
        }
        texts = Texts(words.encode([row.text for row in rows]), labels)
        loaders[split] = options.loader(texts, split, in_batches=True)
    counts = {split: len(rows) for split, rows in by_split.items()}
    return Splits(train=loaders["train"], val=loaders["val"], test=loaders["test"], rows=counts)


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
        )
    ]
)
