"""Whole batches from tensors in memory."""

from __future__ import annotations

import pytest
import torch

from fastmtl.data.tensors import GreyImages, batch_loader
from fastmtl.errors import UsageError

MEAN, STD = 0.13, 0.31


def _images(rows: int = 10, max_shift: int = 0) -> GreyImages:
    images = torch.randint(0, 256, (rows, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = {"a": torch.arange(rows), "b": -torch.arange(rows)}
    return GreyImages(images, labels, mean=MEAN, std=STD, max_shift=max_shift)


def test_a_batch_is_normalised_and_has_three_equal_channels() -> None:
    dataset = _images()
    x, labels = dataset.__getitems__([4, 1, 4])
    assert x.shape == (3, 3, 6, 5)
    assert x.dtype == torch.float32
    expected = (dataset.images[[4, 1, 4]].float() / 255 - MEAN) / STD
    for channel in range(3):
        torch.testing.assert_close(x[:, channel], expected)
    assert isinstance(labels, dict)
    assert labels["a"].tolist() == [4, 1, 4]
    assert labels["b"].tolist() == [-4, -1, -4]
    assert dataset.images.dtype == torch.uint8


def test_one_row_equals_its_row_in_a_batch() -> None:
    dataset = _images()
    x, labels = dataset[3]
    batch, _ = dataset.__getitems__([3])
    assert torch.equal(x, batch[0])
    assert labels == {"a": torch.tensor(3), "b": torch.tensor(-3)}


def test_labels_may_be_one_tensor() -> None:
    dataset = GreyImages(torch.zeros(4, 2, 2, dtype=torch.uint8), torch.arange(4), mean=0.0, std=1.0)
    assert dataset.__getitems__([2, 0])[1].tolist() == [2, 0]
    assert dataset[3][1] == 3


def test_shifts_move_the_image_and_change_each_time() -> None:
    image = torch.zeros(1, 9, 9, dtype=torch.uint8)
    image[0, 4, 4] = 255
    dataset = GreyImages(image, torch.zeros(1), mean=0.0, std=1.0, max_shift=2)
    torch.manual_seed(0)
    x, _ = dataset.__getitems__([0] * 400)
    places = x[:, 0].flatten(1).argmax(1)
    offsets = {(place // 9 - 4, place % 9 - 4) for place in places.tolist()}
    assert offsets == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}
    assert torch.equal(x.sum((1, 2, 3)), torch.full((400,), 3.0))
    torch.manual_seed(0)
    assert torch.equal(dataset.__getitems__([0] * 400)[0], x)


def test_a_shift_lets_black_in_at_the_edges() -> None:
    dataset = GreyImages(torch.full((1, 4, 4), 255, dtype=torch.uint8), torch.zeros(1), mean=0.0, std=1.0, max_shift=1)
    lit = dataset.__getitems__([0] * 200)[0][:, 0].sum((1, 2))
    assert {round(value) for value in lit.tolist()} == {16, 12, 9}


def test_training_batches_are_whole_and_a_permutation() -> None:
    dataset = _images(11)
    loader = batch_loader(dataset, 3, shuffle=True, seed=1)
    rows = [row for _, labels in loader for row in labels["a"].tolist()]
    assert len(loader) == 3
    assert len(rows) == len(set(rows)) == 9
    assert rows != sorted(rows)
    again = [row for _, labels in batch_loader(dataset, 3, shuffle=True, seed=1) for row in labels["a"].tolist()]
    other = [row for _, labels in batch_loader(dataset, 3, shuffle=True, seed=2) for row in labels["a"].tolist()]
    second_epoch = [row for _, labels in loader for row in labels["a"].tolist()]
    assert again == rows
    assert other != rows
    assert second_epoch != rows


def test_evaluation_batches_are_all_rows_in_order() -> None:
    rows = [row for _, labels in batch_loader(_images(11), 4) for row in labels["a"].tolist()]
    assert rows == list(range(11))


def test_workers_give_the_same_batches() -> None:
    dataset = _images(8)
    plain = list(batch_loader(dataset, 4, shuffle=True, seed=3))
    worked = list(batch_loader(dataset, 4, shuffle=True, seed=3, num_workers=1))
    for (x, labels), (y, others) in zip(plain, worked, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(labels["a"], others["a"])


@pytest.mark.parametrize(("rows", "batch_size", "shuffle"), [(5, 0, False), (5, 6, True), (0, 2, False)])
def test_a_loader_without_a_whole_batch_is_refused(rows: int, batch_size: int, shuffle: bool) -> None:
    with pytest.raises(UsageError, match=f"the {rows} rows.*got {batch_size}"):
        batch_loader(_images(rows), batch_size, shuffle=shuffle)
