"""What a loader must give: pairs of inputs and labels, and some of them in every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastmtl.errors import UsageError
from tests.trainer.toy import loaders, make_trainer


class _Once:
    """An iterator with a length, which has nothing left for a second epoch."""

    def __init__(self, batches: Any) -> None:
        self._batches = iter(batches)
        self._length = len(batches)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return self._batches


@pytest.mark.parametrize("multi_input", [False, True])
def test_a_loader_that_is_used_up(multi_input: bool) -> None:
    data = loaders(multi_input=multi_input)
    given = {**data, "task1": _Once(data["task1"])} if multi_input else _Once(data)
    what = r"train_dataloaders\['task1'\]" if multi_input else "train_dataloaders"
    with pytest.raises(UsageError, match=rf"{what} has a length of 3 but gave no batch"):
        make_trainer(multi_input=multi_input).train(given, data, 2)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ((torch.zeros(4, 6), {}, {}), "tuple of 3"),
        ([torch.zeros(4, 6)], "list of 1"),
        (torch.zeros(2, 6), "Tensor"),
        ({"x": torch.zeros(4, 6), "y": {}}, "dict"),
        (None, "NoneType"),
    ],
    ids=["three", "one", "tensor", "dictionary", "none"],
)
@pytest.mark.parametrize("multi_input", [False, True])
def test_batches_that_are_no_pairs(batch: Any, got: str, multi_input: bool) -> None:
    good = loaders(multi_input=multi_input)
    bad = {**good, "task1": [batch]} if multi_input else [batch]
    name = r"\['task1'\]" if multi_input else ""
    trainer = make_trainer(multi_input=multi_input)
    message = rf"{name} must yield batches that are pairs \(inputs, labels\), got {got}"
    with pytest.raises(UsageError, match=f"train_dataloaders{message}"):
        trainer.train(bad, good, 1)
    with pytest.raises(UsageError, match=f"val_dataloaders{message}"):
        trainer.test(bad, mode="val")
