"""MultiMNIST: the recipe, recomputed by hand, and that no source digit crosses a split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmtl.data.digits import SPLITS, Digits, embedded_digits
from fastmtl.data.multimnist import draw_pairs, multimnist, overlay

COUNTS = {"train": 300, "val": 40, "test": 50}


def _triangle(size_in: int, size_out: int) -> np.ndarray:
    """Weights of a linear resize that averages over what an output pixel covers: (size_out, size_in)."""
    scale = size_in / size_out
    centres = (np.arange(size_out) + 0.5) * scale
    distance = np.abs(np.arange(size_in) + 0.5 - centres[:, None]) / scale
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def digits() -> dict[str, Digits]:
    return embedded_digits()


def test_an_image_recomputed_by_hand(digits: dict[str, Digits]) -> None:
    source = digits["train"].images
    left, right = draw_pairs(50, len(source), (7, 0, 0))
    images = overlay(source[left], source[right])
    assert images.shape == (50, 28, 28)
    assert images.dtype == torch.uint8
    resize = _triangle(36, 28)
    for k in (0, 13, 49):
        canvas = np.zeros((36, 36))
        canvas[0:28, 0:28] = source[left[k]].numpy()
        canvas[6:34, 6:34] = np.maximum(canvas[6:34, 6:34], source[right[k]].numpy())
        # Rounding to bytes after each of the two directions.
        np.testing.assert_allclose(images[k].numpy(), resize @ canvas @ resize.T, atol=1.5)


def test_overlay_leaves_its_inputs_alone(digits: dict[str, Digits]) -> None:
    left, right = digits["val"].images[:5], digits["val"].images[5:10]
    before = left.clone(), right.clone()
    overlay(left, right)
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])


def test_labels_are_those_of_the_pair(digits: dict[str, Digits]) -> None:
    datasets = multimnist(digits, COUNTS, seed=3)
    for number, split in enumerate(SPLITS):
        source = digits[split]
        left, right = draw_pairs(COUNTS[split], len(source.labels), (3, 0, number))
        labels = datasets[split].labels
        assert isinstance(labels, dict)
        assert torch.equal(labels["left"], source.labels[left])
        assert torch.equal(labels["right"], source.labels[right])
        inside = datasets[split].images[:, 2:-2, 2:-2]
        assert torch.equal(inside, overlay(source.images[left], source.images[right]))
        assert datasets[split].images.shape == (COUNTS[split], 32, 32)
        assert datasets[split].images.sum() == inside.sum()


def test_every_split_uses_only_its_own_digits(digits: dict[str, Digits]) -> None:
    """Blank one split's digits: its images go black, and not a pixel of the others changes."""
    full = multimnist(digits, COUNTS)
    for blank in SPLITS:
        source = dict(digits)
        source[blank] = Digits(images=torch.zeros_like(digits[blank].images), labels=digits[blank].labels)
        made = multimnist(source, COUNTS)
        for split in SPLITS:
            if split == blank:
                assert made[split].images.sum() == 0
            else:
                assert torch.equal(made[split].images, full[split].images)


def test_the_seed_decides_the_pairs(digits: dict[str, Digits]) -> None:
    one, same, other = (multimnist(digits, COUNTS, seed=seed)["train"] for seed in (0, 0, 1))
    stream = multimnist(digits, COUNTS, seed=0, stream=1)["train"]
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)
    assert not torch.equal(one.images, stream.images)


def test_splits_draw_independently_of_each_other_s_size(digits: dict[str, Digits]) -> None:
    small = multimnist(digits, COUNTS)
    large = multimnist(digits, {**COUNTS, "train": 900})
    assert torch.equal(small["test"].images, large["test"].images)
    assert not torch.equal(small["val"].images, small["test"].images[:40])


def test_only_training_images_are_shifted(digits: dict[str, Digits]) -> None:
    datasets = multimnist(digits, COUNTS, max_shift=2)
    assert [datasets[split].max_shift for split in SPLITS] == [2, 0, 0]


def test_all_pairs_of_classes_come_up(digits: dict[str, Digits]) -> None:
    labels = multimnist(digits, {**COUNTS, "train": 5000})["train"].labels
    assert isinstance(labels, dict)
    assert len(set(zip(labels["left"].tolist(), labels["right"].tolist(), strict=True))) == 100
