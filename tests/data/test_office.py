"""Office-31 and Office-Home: the lists are followed, and what is missing is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmtl.data import DATASETS, load
from fastmtl.data.office import DOMAINS, OfficeDataset
from fastmtl.errors import UsageError
from tests.libmtl import checkout

ROWS = {"train": 4, "val": 2, "test": 3}


def make_office(root: Path, name: str) -> Path:
    """Write images of a few pixels, and the lists of them, in LibMTL's layout."""
    rng = np.random.default_rng(0)
    lists = root / "data_txt" / name
    lists.mkdir(parents=True)
    for number, domain in enumerate(DOMAINS[name]):
        for split, rows in ROWS.items():
            lines = []
            for row in range(rows + number):
                label = (row * 7 + number) % 31
                path = root / domain / f"class_{label}" / f"{split}_{row}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (8 + row, 10, 3), dtype=np.uint8)).save(path)
                lines.append(f"{path.relative_to(root)} {label}\n")
            (lists / f"{domain}_{split}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("name", DOMAINS)
def test_a_bundle_fits_together(name: str, tmp_path: Path) -> None:
    bundle = load(name, path=make_office(tmp_path, name), batch_size=2)
    assert bundle.multi_input
    assert bundle.encoder == "resnet18"
    extra = len(DOMAINS[name]) - 1
    assert bundle.rows == {split: rows + extra for split, rows in ROWS.items()}
    for split in ROWS:
        loaders: Any = getattr(bundle, split)
        assert list(loaders) == list(DOMAINS[name])
        for number, domain in enumerate(DOMAINS[name]):
            assert len(loaders[domain].dataset) == ROWS[split] + number
            images, labels = next(iter(loaders[domain]))
            assert images.shape[1:] == (3, 224, 224)
            assert labels.dtype == torch.int64
    classes = {"office-31": 31, "office-home": 65}[name]
    decoders = bundle.decoders()
    assert list(decoders) == list(DOMAINS[name])
    assert decoders[DOMAINS[name][0]](torch.zeros(2, 512, 7, 7)).shape == (2, classes)


def test_pixels_are_scaled_as_for_imagenet(tmp_path: Path) -> None:
    Image.new("L", (30, 20), 255).save(tmp_path / "white.png")
    (tmp_path / "list.txt").write_text("white.png 5\n")
    image, label = OfficeDataset(tmp_path, tmp_path / "list.txt")[0]
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(image, white[:, None, None].expand(3, 224, 224))
    assert label == 5


def test_fewer_rows_can_be_asked_for(tmp_path: Path) -> None:
    bundle = load("office-31", path=make_office(tmp_path, "office-31"), batch_size=2, n_train=3)
    train: Any = bundle.train
    assert [len(loader.dataset) for loader in train.values()] == [3, 3, 3]
    assert bundle.rows["train"] == 3


def test_augmentation_changes_training_images_alone(tmp_path: Path) -> None:
    bundle = load("office-31", path=make_office(tmp_path, "office-31"), batch_size=2, augment=True)
    for split in ROWS:
        images: Any = getattr(bundle, split)["amazon"].dataset
        seen = [images[0][0] for _ in range(4)]
        assert all(each.shape == (3, 224, 224) for each in seen)
        assert all(torch.equal(each, seen[0]) for each in seen) == (split != "train")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"amazon_train.txt' is missing: copy LibMTL's examples/office/data_txt"):
        load("office-31", path=tmp_path)
    listing = tmp_path / "list.txt"
    for text, message in (("", "is empty"), ("a.jpg 1\nb.jpg\n", "Line 2 of .* must be a path and a class")):
        listing.write_text(text)
        with pytest.raises(UsageError, match=message):
            OfficeDataset(tmp_path, listing)
    listing.write_text("gone.jpg 1\n")
    with pytest.raises(UsageError, match=r"gone.jpg' cannot be read"):
        _ = OfficeDataset(tmp_path, listing)[0]


def test_a_class_that_the_data_set_has_not_is_named(tmp_path: Path) -> None:
    with (make_office(tmp_path, "office-31") / "data_txt" / "office-31" / "dslr_val.txt").open("a") as listing:
        listing.write("dslr/class_31/val_9.jpg 31\n")
    with pytest.raises(UsageError, match=r"dslr_val.txt' must hold classes from 0 to 30, got 31"):
        load("office-31", path=tmp_path, batch_size=2)


@pytest.mark.libmtl
@pytest.mark.parametrize("name", DOMAINS)
def test_the_lists_of_libmtl_are_read(name: str) -> None:
    lists = checkout() / "examples" / "office" / "data_txt" / name
    for split, most in DATASETS[name].rows.items():
        rows = [OfficeDataset(".", lists / f"{domain}_{split}.txt").rows for domain in DOMAINS[name]]
        assert max(map(len, rows)) == most
        classes = DATASETS[name].outputs[DOMAINS[name][0]]
        assert {label for domain in rows for _, label in domain} <= set(range(classes))
        assert all(path.startswith(f"{d}/") for d, own in zip(DOMAINS[name], rows, strict=True) for path, _ in own)
