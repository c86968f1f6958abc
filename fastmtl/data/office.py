"""Office-31 and Office-Home: photographs of the same objects in several domains, each domain a task of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from fastmtl.data.digits import SPLITS
from fastmtl.data.images import as_image, to_tensor
from fastmtl.data.multimnist_sets import classification_head, classification_task
from fastmtl.data.registry import DatasetInfo, Facts, Loader, LoaderOptions, Splits, register
from fastmtl.errors import UsageError
from fastmtl.model._torchvision import import_torchvision

__all__ = ["DOMAINS", "OfficeDataset"]

DOMAINS = {
    "office-31": ("amazon", "dslr", "webcam"),
    "office-home": ("Art", "Clipart", "Product", "Real_World"),
}
_SIZE = 224
# Of ImageNet's pixels, as for the pretrained encoders.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class OfficeDataset(Dataset[tuple[Tensor, int]]):
    """The images of one domain and split: ``(3, 224, 224)`` float32, normalised as for ImageNet, and their class.

    Args:
        root: Folder of the images.
        listing: File with one image per line, its path below ``root`` and its class, as LibMTL's ``data_txt``.
        augmentation: Crop a random 8 to 100 % of each image's area and mirror half of the images, as is usual for
            ImageNet (Szegedy et al., CVPR 2015).

    Raises:
        UsageError: The listing is missing, empty or has a line of another form.
    """

    def __init__(self, root: str | Path, listing: str | Path, augmentation: bool = False) -> None:
        self.root = Path(root).expanduser()
        self.rows = _read_listing(Path(listing))
        transforms = import_torchvision().transforms
        framed = [transforms.Resize((_SIZE, _SIZE))]
        if augmentation:
            framed = [transforms.RandomResizedCrop(_SIZE), transforms.RandomHorizontalFlip()]
        self._transform = transforms.Compose([*framed, transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its class.

        Raises:
            UsageError: The image is missing or cannot be decoded.
        """
        from PIL import Image

        name, label = self.rows[index]
        try:
            with Image.open(self.root / name) as image:
                pixels: Tensor = self._transform(image.convert("RGB"))
        except OSError as error:
            raise UsageError(f"The image {str(self.root / name)!r} cannot be read ({error}).") from error
        return pixels, label


def _read_listing(path: Path) -> list[tuple[str, int]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(
            f"The list of images {str(path)!r} is missing: copy LibMTL's examples/office/data_txt into the data folder."
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdigit():
            raise UsageError(f"Line {number} of {str(path)!r} must be a path and a class, got {line!r}.")
        rows.append((name, int(label)))
    if not rows:
        raise UsageError(f"The list of images {str(path)!r} is empty.")
    return rows


def _read_row(row: Mapping[str, Any], facts: Facts) -> Tensor:
    """Return an image, normalised as for ImageNet."""
    return to_tensor(as_image(row["image"]), (_SIZE, _SIZE), _MEAN, _STD)


def _splits(name: str, classes: int, options: LoaderOptions) -> Splits:
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
        load_splits=partial(_splits, name, classes),
        make_task=classification_task,
        make_head=classification_head,
        read_row=_read_row,
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
