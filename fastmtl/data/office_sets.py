"""Office-31 and Office-Home by name, in LibMTL's splits."""

from __future__ import annotations

from functools import partial

from torch.utils.data import Subset

from fastmtl.data.digits import SPLITS
from fastmtl.data.multimnist_sets import classification_head, classification_task
from fastmtl.data.office import DOMAINS, OfficeDataset
from fastmtl.data.registry import DatasetInfo, Loader, LoaderOptions, Splits, register
from fastmtl.errors import UsageError

__all__ = ["office_splits"]


def office_splits(name: str, classes: int, options: LoaderOptions) -> Splits:
    """Load an Office data set from ``<path>/data_txt/<name>/<domain>_<split>.txt`` and the images."""
    assert options.path is not None
    loaders: dict[str, dict[str, Loader]] = {split: {} for split in SPLITS}
    rows = dict.fromkeys(SPLITS, 0)
    for number, domain in enumerate(DOMAINS[name]):
        for split in SPLITS:
            train = split == "train"
            listing = options.path / "data_txt" / name / f"{domain}_{split}.txt"
            images = OfficeDataset(options.path, listing, augmentation=options.augment and train)
            highest = max(label for _, label in images.rows)
            if highest >= classes:
                raise UsageError(f"{str(listing)!r} must hold classes from 0 to {classes - 1}, got {highest}.")
            count = min(options.n_train or len(images), len(images)) if train else len(images)
            part = images if count == len(images) else Subset(images, range(count))
            loaders[split][domain] = options.loader(part, split, number=number)
            rows[split] = max(rows[split], count)
    return Splits(train=loaders["train"], val=loaders["val"], test=loaders["test"], rows=rows)


def _info(name: str, classes: int, rows: dict[str, int]) -> DatasetInfo:
    return DatasetInfo(
        name=name,
        description=f"{classes} kinds of objects, each domain a task with images of its own (multi-input).",
        source="a folder with the images, and LibMTL's lists of them in data_txt",
        licence="as of the folder's data",
        multi_input=True,
        outputs=dict.fromkeys(DOMAINS[name], classes),
        rows=rows,
        encoders=("resnet18", "resnet34", "resnet50"),
        load_splits=partial(office_splits, name, classes),
        make_task=classification_task,
        make_head=classification_head,
        needs_path=True,
        test_batch_size=64,
    )


# Rows of the largest domain.
register(
    [
        _info("office-31", 31, {"train": 1680, "val": 552, "test": 585}),
        _info("office-home", 65, {"train": 2635, "val": 860, "test": 944}),
    ]
)
