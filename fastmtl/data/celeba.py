"""CelebA (Liu et al., ICCV 2015): 40 attributes of faces, each a task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmtl.data.images import as_image, open_image, to_tensor
from fastmtl.data.multimnist_sets import classification_head
from fastmtl.data.registry import DatasetInfo, Facts, LoaderOptions, Splits, register
from fastmtl.data.tasks import TaskInfo
from fastmtl.errors import UsageError
from fastmtl.loss import BCELoss
from fastmtl.metrics import F1Metric

__all__ = ["ATTRIBUTES", "AttributeF1", "CelebA"]

ATTRIBUTES = (
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
)
_SIZE = (64, 64)
_SPLITS = {"train": 0, "val": 1, "test": 2}
# Where each file may be: beside the images, or in the folders of the archive.
_PLACES = {
    "list_attr_celeba.txt": ("", "Anno"),
    "list_eval_partition.txt": ("", "Eval"),
    "img_align_celeba": ("", "Img"),
}


class CelebA(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Faces (3, 64, 64), pixels from 0 to 1, and labels (1,) of 0 and 1 for each of ``ATTRIBUTES``.

    Args:
        root: Folder with ``list_attr_celeba.txt``, ``list_eval_partition.txt`` and the folder ``img_align_celeba``, or
            with these in ``Anno``, ``Eval`` and ``Img``.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        UsageError: A file is missing, or is not as it should be.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        root = Path(root).expanduser()
        self.images = _find(root, "img_align_celeba")
        attributes, parts = _find(root, "list_attr_celeba.txt"), _find(root, "list_eval_partition.txt")
        _count, header, *lines = _lines(attributes)
        if tuple(header.split()) != ATTRIBUTES:
            raise UsageError(f"Line 2 of {str(attributes)!r} must name CelebA's 40 attributes, from {ATTRIBUTES[0]}.")
        wanted = dict(line.split() for line in _lines(parts, fields=2))
        rows = [line.split() for line in lines]
        bad = next((number for number, row in enumerate(rows, 3) if len(row) != 1 + len(ATTRIBUTES)), None)
        if bad is not None:
            raise UsageError(f"Line {bad} of {str(attributes)!r} must be a file and 40 values of 1 or -1: is it whole?")
        self.names = [row[0] for row in rows if wanted.get(row[0]) == str(_SPLITS[split])]
        if not self.names:
            raise UsageError(f"{str(parts)!r} has no images of {split} that are in {str(attributes)!r} too.")
        chosen = [row[1:] for row in rows if wanted.get(row[0]) == str(_SPLITS[split])]
        self.labels = torch.from_numpy((np.array(chosen) == "1").astype(np.float32))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one face and its labels.

        Raises:
            UsageError: The image is missing or cannot be decoded.
        """
        image = to_tensor(open_image(self.images / self.names[index]).convert("RGB"), _SIZE)
        return image, {name: self.labels[index, place : place + 1] for place, name in enumerate(ATTRIBUTES)}


def _find(root: Path, name: str) -> Path:
    for folder in _PLACES[name]:
        if (root / folder / name).exists():
            return root / folder / name
    raise UsageError(f"{str(root)!r} must hold CelebA: {name} is neither there nor in {_PLACES[name][1]}.")


def _lines(path: Path, fields: int | None = None) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} cannot be read ({error}).") from error
    if len(lines) < 3:
        raise UsageError(f"{str(path)!r} has only {len(lines)} lines: is it whole?")
    bad = next((number for number, line in enumerate(lines, 1) if fields and len(line.split()) != fields), None)
    if bad is not None:
        raise UsageError(f"Line {bad} of {str(path)!r} must be a file and 0, 1 or 2, for train, val and test.")
    return lines


class AttributeF1(F1Metric):
    """F1 score of predictions (batch, 1), yes where they are above 0, as `BCELoss` has them; labels are 0 and 1."""

    def __init__(self) -> None:
        super().__init__(2, "binary")

    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        """Add one batch; labels that are NaN are skipped."""
        super().update_fun(torch.cat([torch.zeros_like(pred), pred], 1), gt.nan_to_num(-1).long().view(len(pred)))


def _splits(options: LoaderOptions) -> Splits:
    assert options.path is not None
    splits = {split: CelebA(options.path, split) for split in _SPLITS}
    return options.splits(splits["train"], splits["test"], splits["val"])


def _read_row(row: Mapping[str, Any], facts: Facts) -> Tensor:
    """Return a face, 64 x 64."""
    return to_tensor(as_image(row["image"]).convert("RGB"), _SIZE)


register(
    [
        DatasetInfo(
            name="celeba",
            description="CelebA: 40 attributes of aligned faces, each a task, 64 x 64.",
            source="a folder with CelebA's aligned images, attributes and partition",
            licence="as of the folder's data",
            tasks={
                name: TaskInfo(
                    outputs=1,
                    make_loss=BCELoss,
                    make_metric=AttributeF1,
                    metrics=("F1",),
                    weight=(1,),
                    make_head=classification_head,
                )
                for name in ATTRIBUTES
            },
            rows={"train": 162_770, "val": 19_867, "test": 19_962},
            encoders=("conv9", "resnet18", "resnet34", "resnet50", "conv"),
            load_splits=_splits,
            read_row=_read_row,
            needs_path=True,
            batch_size=256,
            test_batch_size=256,
        )
    ]
)
