"""Office-31 and Office-Home: photographs of the same objects in several domains, each domain a task of its own."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from fastmtl.errors import UsageError
from fastmtl.model._torchvision import import_torchvision

__all__ = ["DOMAINS", "OfficeDataset"]

DOMAINS = {
    "office-31": ("amazon", "dslr", "webcam"),
    "office-home": ("Art", "Clipart", "Product", "Real_World"),
}
_SIZE = 224
# Of ImageNet's pixels, which the pretrained encoders are used to.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class OfficeDataset(Dataset[tuple[Tensor, int]]):
    """The images of one domain and split: ``(3, 224, 224)`` float32, normalised as for ImageNet, and their class.

    Args:
        root: Folder of the images.
        listing: File with one image per line, its path below ``root`` and its class, as LibMTL's ``data_txt``.
        augmentation: Cut a random part of 8 to 100 % of each image's area in place of the whole, and mirror half of
            them, as is usual in training on ImageNet (Szegedy et al., CVPR 2015).

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
