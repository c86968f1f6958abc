"""The source digits: those in the package, and folders of IDX files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmtl.data.digits import SPLITS, embedded_digits, folder_digits
from fastmtl.errors import UsageError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _write(path: Path, array: np.ndarray) -> None:
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, rows, suffix in (("train", 5003, ".gz"), ("t10k", 4, "")):
        _write(tmp_path / f"{name}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8))
        _write(tmp_path / f"{name}-labels-idx1-ubyte{suffix}", (np.arange(rows) % 10).astype(np.uint8))
    return tmp_path


def test_every_class_is_equally_often_in_every_split() -> None:
    digits = embedded_digits()
    for split, each in zip(SPLITS, (400, 50, 50), strict=True):
        assert digits[split].images.shape == (10 * each, 28, 28)
        assert digits[split].images.dtype == torch.uint8
        assert digits[split].labels.dtype == torch.int64
        assert torch.bincount(digits[split].labels).tolist() == [each] * 10


def test_no_digit_is_in_two_splits() -> None:
    seen = {split: {row.numpy().tobytes() for row in each.images} for split, each in embedded_digits().items()}
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    assert sum(map(len, seen.values())) == 5000


def test_they_look_like_digits() -> None:
    digits = embedded_digits()["train"]
    means = torch.stack([digits.images[digits.labels == c].float().mean(0) for c in range(10)])
    test = embedded_digits()["test"]
    nearest = torch.cdist(test.images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.7


def test_a_folder_is_split_at_the_end_of_its_training_file(folder: Path) -> None:
    digits = folder_digits(str(folder))
    assert [len(digits[split].labels) for split in SPLITS] == [3, 5000, 4]
    assert digits["train"].labels.tolist() == [0, 1, 2]
    assert digits["val"].labels[:2].tolist() == [3, 4]
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    assert digits["train"].images[1].numpy().tobytes() == raw[16 + 784 : 16 + 2 * 784]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.*does not exist"):
        folder_digits(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / (name + ".gz" if name.startswith("train") else name)).unlink()
    with pytest.raises(UsageError, match=f"has no file {name}"):
        folder_digits(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\x00\x00\x08\x03\x00\x00", b"\x00\x00\x08\x01" + struct.pack(">i", 9) + b"ab"]
)
def test_a_damaged_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(UsageError, match=r"t10k-labels.*not a whole IDX file"):
        folder_digits(folder)


def test_a_damaged_archive_is_named(folder: Path) -> None:
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match="cannot be read"):
        folder_digits(folder)


def test_images_and_labels_must_agree(folder: Path) -> None:
    _write(folder / "t10k-labels-idx1-ubyte", np.zeros(3, dtype=np.uint8))
    with pytest.raises(UsageError, match="one 28 x 28 image per label"):
        folder_digits(folder)


def test_a_small_training_file_is_refused(folder: Path) -> None:
    _write(folder / "train-images-idx3-ubyte.gz", np.zeros((20, 28, 28), dtype=np.uint8))
    _write(folder / "train-labels-idx1-ubyte.gz", np.zeros(20, dtype=np.uint8))
    with pytest.raises(UsageError, match="more than 5000"):
        folder_digits(folder)
