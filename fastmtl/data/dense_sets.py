"""Data sets of segmentation, depth and surface normals: NYUv2 and Cityscapes from folders, and rendered rooms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from fastmtl.data.images import to_tensor
from fastmtl.data.nyuv2 import TASKS, Cityscapes, NYUv2
from fastmtl.data.registry import DatasetInfo, Facts, LoaderOptions, Splits, Task, register
from fastmtl.data.rooms import SIZE, default_folder, make_rooms
from fastmtl.data.rooms_scene import CLASSES
from fastmtl.errors import UsageError
from fastmtl.loss import DepthLoss, NormalLoss, SegLoss
from fastmtl.metrics import DepthMetric, NormalMetric, SegMetric

__all__ = ["ROWS", "DenseHead", "dense_task"]

ROWS = {"train": 256, "test": 64}
_WIDTH = 128
# The least channels that a ResNet's output has.
_OF_RESNETS = 512


def dense_task(task: str, classes: int = len(CLASSES)) -> Task:
    """Return the entry of a task of NYUv2 or Cityscapes in ``task_dict``, as LibMTL's examples have it."""
    if task == "segmentation":
        names, metric = ["mIoU", "pixAcc"], SegMetric(classes)
        return Task(metrics=names, metrics_fn=metric, loss_fn=SegLoss(), weight=[1, 1])
    if task == "depth":
        return Task(metrics=["abs_err", "rel_err"], metrics_fn=DepthMetric(), loss_fn=DepthLoss(), weight=[0, 0])
    names = ["mean", "median", "<11.25", "<22.5", "<30"]
    return Task(metrics=names, metrics_fn=NormalMetric(), loss_fn=NormalLoss(), weight=[0, 0, 1, 1, 1])


class DenseHead(nn.Module):
    """A decoder whose map ``(batch, outputs, h', w')`` is interpolated to the size of the image."""

    def __init__(self, head: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.head = head
        self.size = size

    def forward(self, features: Tensor) -> Tensor:
        """Return ``(batch, outputs, *size)``."""
        return F.interpolate(self.head(features), self.size, mode="bilinear", align_corners=True)


def _light_head(feature_dim: int, outputs: int, size: tuple[int, int]) -> nn.Module:
    convs = nn.Sequential(
        nn.Conv2d(feature_dim, _WIDTH, 3, padding=1, bias=False),
        nn.BatchNorm2d(_WIDTH),
        nn.ReLU(),
        nn.Conv2d(_WIDTH, outputs, 1),
    )
    return DenseHead(convs, size)


def _map_head(feature_dim: int, outputs: int, size: tuple[int, int]) -> nn.Module:
    """Return DeepLab's head for a ResNet's features, SegNet's two convolutions for fewer channels."""
    from fastmtl.model import DeepLabHead, SegNet_MTAN_decoder

    if feature_dim >= _OF_RESNETS:
        return DenseHead(DeepLabHead(feature_dim, outputs), size)
    return DenseHead(SegNet_MTAN_decoder("map", outputs, feature_dim), size)


def _splits(
    folder: Path,
    options: LoaderOptions,
    counts: dict[str, int | None],
    read: type[NYUv2] | type[Cityscapes] = NYUv2,
) -> Splits:
    loaders, rows = {}, {}
    for split, count in counts.items():
        whole = read(folder, split, augmentation=options.augment and split == "train")
        if count is not None and count > len(whole):
            raise UsageError(f"{str(folder)!r} has {len(whole)} rows of {split}, fewer than the {count} asked for.")
        rows[split] = count or len(whole)
        loaders[split] = options.loader(whole if count is None else Subset(whole, range(count)), split)
        height, width = whole[0][0].shape[-2:]
    # LibMTL tests on val and validates on nothing.
    return Splits(train=loaders["train"], val=None, test=loaders["test"], rows=rows, image_size=(height, width))


def _from_folder(read: type[NYUv2] | type[Cityscapes], options: LoaderOptions) -> Splits:
    assert options.path is not None
    return _splits(options.path, options, {"train": options.n_train, "test": None}, read)


def _rooms(options: LoaderOptions) -> Splits:
    if options.path is not None:
        return _splits(options.path, options, {"train": options.n_train, "test": None})
    folder, train = default_folder(), options.n_train or ROWS["train"]

    def announce(done: int, count: int) -> None:
        if done == 1:
            print(f"rooms: rendering {count} scenes of {SIZE[0]} x {SIZE[1]} pixels into {folder}", flush=True)

    make_rooms(folder, train=train, test=ROWS["test"], progress=announce)
    return _splits(folder, options, {"train": train, "test": ROWS["test"]})


def _read_row(row: Mapping[str, Any], facts: Facts) -> Tensor:
    """Return an image in the size of the training images, pixels from 0 to 1."""
    return to_tensor(row["image"], facts["image_size"])


_OUTPUTS = dict(zip(TASKS, (len(CLASSES), 1, 3), strict=True))
_LABELS = {"segmentation": tuple(CLASSES)}
_ENCODERS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet18-dilated",
    "resnet50-dilated",
    "conv",
    "segnet",
    "segnet-mtan",
)
_dense = partial(
    DatasetInfo, multi_input=False, outputs=_OUTPUTS, make_task=dense_task, read_row=_read_row, labels=_LABELS
)

register(
    [
        _dense(
            name="rooms",
            description="Rendered rooms: segmentation, depth and surface normals, all exact. Not photographs.",
            source="rendered on first use, or with `fastmtl data make rooms`",
            licence="as fastmtl's",
            rows=ROWS,
            encoders=_ENCODERS,
            load_splits=_rooms,
            make_head=_light_head,
            batch_size=8,
            test_batch_size=32,
        ),
        _dense(
            name="nyuv2",
            description="NYUv2: segmentation, depth and surface normals of photographed rooms, 288 x 384.",
            source="a folder in the layout of LibMTL's example",
            licence="as of the folder's data",
            rows={"train": 795, "test": 654},
            # LibMTL's example trains a dilated ResNet-50.
            encoders=("resnet50-dilated", *(name for name in _ENCODERS if name != "resnet50-dilated")),
            load_splits=partial(_from_folder, NYUv2),
            make_head=_map_head,
            needs_path=True,
            batch_size=8,
            test_batch_size=8,
        ),
        DatasetInfo(
            name="cityscapes",
            description="Cityscapes: segmentation in 7 classes and inverse depth of street scenes, 128 x 256.",
            source="a folder in the layout of LibMTL's example, or of MTAN's authors",
            licence="as of the folder's data",
            outputs={"segmentation": Cityscapes.classes, "depth": 1},
            make_task=partial(dense_task, classes=Cityscapes.classes),
            read_row=_read_row,
            rows={"train": 2975, "test": 500},
            encoders=("resnet50-dilated", *(name for name in _ENCODERS if name != "resnet50-dilated")),
            load_splits=partial(_from_folder, Cityscapes),
            make_head=_map_head,
            needs_path=True,
            batch_size=64,
            test_batch_size=64,
        ),
    ]
)
