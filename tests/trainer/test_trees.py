"""Batches in whatever containers a loader puts them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmtl.engine.trees import joined, leaves, map_tree
from fastmtl.trainer.setup.loaders import to_channels_last, to_device
from tests.trainer.toy import encoder, flat, halves, loaders, make_trainer


class Pair(NamedTuple):
    left: Tensor
    right: list[Any]


def test_containers_stay_what_they_are() -> None:
    tree = {"a": Pair(torch.ones(2), [1, (2, None)])}
    found = map_tree(lambda leaf: leaf if leaf is None else leaf + 1, tree)
    assert isinstance(found["a"], Pair)
    assert found["a"].left.tolist() == [2, 2]
    assert found["a"].right == [2, (3, None)]
    assert leaves(tree)[1:] == [1, 2, None]


def test_all_that_is_done_to_batches_knows_named_tuples() -> None:
    images = torch.ones(4, 3, 5, 5)
    batch = Pair(images, ["name"]), {"task": torch.arange(4)}
    assert isinstance(to_device(batch[0], torch.device("cpu")), Pair)
    assert to_channels_last(batch[0]).left.is_contiguous(memory_format=torch.channels_last)
    first, second = halves(batch)
    assert first[0].left.shape == second[0].left.shape == (2, 3, 5, 5)
    assert first[0].right == ["name"]
    # Lists of something for each row are cut as tensors are.
    first, second = halves(
        (Pair(images, ["a", "b", "c", "d"]), {"task": [{"boxes": torch.ones(k, 4)} for k in range(4)]})
    )
    assert (first[0].right, second[0].right) == (["a", "b"], ["c", "d"])
    assert [len(each["boxes"]) for each in second[1]["task"]] == [2, 3]
    whole = joined([{"task": Pair(images, [images])}] * 2)
    assert whole["task"].left.shape == whole["task"].right[0].shape == (8, 3, 5, 5)


def test_what_moves_itself_is_not_taken_apart() -> None:
    class Moving(dict[str, Tensor]):
        def to(self, *_: Any, **__: Any) -> str:
            return "moved"

    given: list[Any] = [Moving()]
    assert to_device(given, torch.device("cpu")) == ["moved"]


def test_training_on_named_tuples() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()

        def forward(self, inputs: Pair) -> Tensor:
            return self.inner(inputs.left)

    plain = list(loaders())
    ends = []
    for kind, data in ((encoder, plain), (Left, [(Pair(x, [x]), labels) for x, labels in plain])):
        trainer = make_trainer("MGDA", encoder_class=kind)
        trainer.train(data, data, 1)
        ends.append(flat(trainer.model.parameters()))
    assert torch.equal(*ends)
