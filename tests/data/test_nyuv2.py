"""NYUv2's folders: what is read, how it is changed at random, and what is said of mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmtl.data import load
from fastmtl.data.nyuv2 import NYUv2, RandomScaleCrop
from fastmtl.data.rooms import make_rooms
from fastmtl.errors import UsageError
from tests.libmtl import load_file

SIZE = (24, 32)
KINDS = ("image", "label", "depth", "normal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rooms in NYUv2's layout."""
    root = tmp_path_factory.mktemp("rooms")
    make_rooms(root / "rooms", train=6, test=3, size=SIZE)
    return root / "rooms"


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A folder as it is downloaded: float64, and pixels without label, depth or normal."""
    for split, rows in (("train", 5), ("val", 2)):
        for kind, shape in zip(KINDS, ((*SIZE, 3), SIZE, (*SIZE, 1), (*SIZE, 3)), strict=True):
            (tmp_path / split / kind).mkdir(parents=True)
            for row in range(rows):
                values = np.random.default_rng(row).uniform(0.1, 1, shape)
                if kind == "label":
                    values = np.random.default_rng(row).integers(-1, 13, shape).astype(np.float64)
                else:
                    values[:3] = 0
                np.save(tmp_path / split / kind / f"{row}.npy", values)
    return tmp_path


def test_rows_are_the_files_with_channels_first(folder: Path) -> None:
    data = NYUv2(folder, "train")
    assert len(data) == 6
    assert len(NYUv2(folder, "test")) == len(NYUv2(folder, "val")) == 3
    image, labels = data[4]
    assert image.shape == (3, *SIZE)
    files = {kind: np.load(folder / "train" / kind / "4.npy") for kind in KINDS}
    assert np.array_equal(image.permute(1, 2, 0), files["image"])
    assert np.array_equal(labels["segmentation"], files["label"])
    assert np.array_equal(labels["depth"][0], files["depth"][..., 0])
    assert np.array_equal(labels["normal"].permute(1, 2, 0), files["normal"])
    assert all(each.dtype == torch.float32 for each in (image, *labels.values()))
    with pytest.raises(IndexError):
        _ = data[6]


def test_scale_crop_brings_the_camera_nearer() -> None:
    height, width = 12, 24
    ramp = torch.linspace(0, 1, width).expand(3, height, width)
    label = torch.arange(width).float().expand(height, width)
    depth = torch.full((1, height, width), 3.0)
    image, labels, depths, normals = RandomScaleCrop([1.5])(ramp, label, depth, ramp)
    torch.testing.assert_close(depths, depth / 1.5)
    assert image.shape == normals.shape == ramp.shape
    part = 1 / 1.5 * width
    assert image[0, 0, -1] - image[0, 0, 0] == pytest.approx((part - 1) / (width - 1), abs=1e-5)
    assert set(labels.flatten().tolist()) <= set(range(width))
    assert len(labels.unique()) == int(part)
    for same, before in zip(RandomScaleCrop([1.0])(ramp, label, depth, ramp), (ramp, label, depth, ramp), strict=True):
        torch.testing.assert_close(same, before)


def test_a_mirrored_row_has_mirrored_normals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomScaleCrop, "__call__", lambda self, *maps: maps)
    image, labels = NYUv2(folder)[0]
    mirrored = 0
    torch.manual_seed(0)
    for _ in range(20):
        changed, their = NYUv2(folder, augmentation=True)[0]
        if torch.equal(changed, image):
            assert all(torch.equal(their[task], labels[task]) for task in labels)
            continue
        mirrored += 1
        assert torch.equal(changed, image.flip(-1))
        assert torch.equal(their["segmentation"], labels["segmentation"].flip(-1))
        assert torch.equal(their["depth"], labels["depth"].flip(-1))
        assert torch.equal(their["normal"][0], -labels["normal"][0].flip(-1))
        assert torch.equal(their["normal"][1:], labels["normal"][1:].flip(-1))
    assert 3 < mirrored < 17


def test_augmentation_follows_torch_seed(folder: Path) -> None:
    data = NYUv2(folder, augmentation=True)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(torch.stack([data[0][0] for _ in range(4)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", ["nyuv2", "rooms"])
def test_a_bundle_fits_together(name: str, real: Path) -> None:
    encoder = "conv"
    bundle = load(name, batch_size=2, path=real, encoder=encoder, augment=True)
    assert bundle.rows == {"train": 5, "test": 2}
    assert bundle.val is None
    loaders: Any = bundle.train
    assert len(loaders) == 2
    images, labels = next(iter(loaders))
    assert images.shape == (2, 3, *SIZE)
    features = bundle.encoder_class()(images)
    for task, decoder in bundle.decoders().items():
        pred = decoder(features)
        assert pred.shape == (2, {"segmentation": 13, "depth": 1, "normal": 3}[task], *SIZE)
        spec = bundle.task_dict[task]
        assert torch.isfinite(spec["loss_fn"].compute_loss(pred, labels[task]))
        spec["metrics_fn"].update_fun(pred, labels[task])
        assert len(spec["metrics_fn"].score_fun()) == len(spec["metrics"]) == len(spec["weight"])


def test_rooms_are_made_when_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTMTL_CACHE", str(tmp_path))
    monkeypatch.setattr("fastmtl.data.dense_sets.ROWS", {"train": 4, "test": 2})
    bundle = load("rooms", batch_size=2, encoder="conv")
    assert bundle.rows == {"train": 4, "test": 2}
    said = f"rooms: rendering 6 scenes of 72 x 96 pixels into {tmp_path / 'rooms-72x96-seed0'}\n"
    assert capsys.readouterr().out == said
    assert load("rooms", batch_size=2, encoder="conv", n_train=3).rows["train"] == 3
    assert capsys.readouterr().out == ""
    assert load("rooms", batch_size=2, encoder="conv", n_train=5).rows["train"] == 5
    assert "rendering 1 scenes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("val", "must hold train and val.*has no val/image"),
        ("train/depth", "has no train/depth"),
        ("train/normal/3.npy", "has 6 images, which must be 0.npy to 5.npy.*normal/3.npy is missing"),
        ("train/image/0.npy", "has 5 images.*image/0.npy is missing"),
    ],
)
def test_missing_parts_are_named(missing: str, message: str, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    path = root / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(UsageError, match=message):
        load("nyuv2", path=root, batch_size=2, encoder="conv")


def test_damaged_files_and_too_few_rows_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/train/depth/2.npy").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"depth/2.npy' cannot be read"):
        _ = NYUv2(tmp_path / "copy")[2]
    with pytest.raises(UsageError, match="6 rows of train, fewer than the 9 asked for"):
        load("nyuv2", path=folder, batch_size=2, n_train=9, encoder="conv")
    for file in (tmp_path / "copy/val/image").iterdir():
        file.unlink()
    with pytest.raises(UsageError, match=r"holds no .npy files"):
        NYUv2(tmp_path / "copy", "val")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("depth", np.ones((12, 16, 1)), r"depth/2.npy' must have the shape \(24, 32, 1\), got \(12, 16, 1\)"),
        ("normal", np.ones((*SIZE, 1)), r"normal/2.npy' must have the shape \(24, 32, 3\), got \(24, 32, 1\)"),
        ("image", np.ones(SIZE), r"image/2.npy' must have the shape \(24, 32, 3\), got \(24, 32\)"),
        ("label", np.ones((*SIZE, 1)), r"label/2.npy' must have the shape \(24, 32\), got \(24, 32, 1\)"),
        ("label", np.full(SIZE, 13.0), "label/2.npy' must hold the classes 0 to 12, .* got values from 13 to 13"),
        ("label", np.full(SIZE, -2), "label/2.npy' must hold .* from -2 to -2"),
    ],
)
def test_maps_that_do_not_fit_are_named(
    kind: str, values: np.ndarray[Any, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    np.save(tmp_path / f"copy/train/{kind}/2.npy", values)
    data = NYUv2(tmp_path / "copy")
    assert len(data[1]) == 2
    with pytest.raises(UsageError, match=message):
        _ = data[2]


@pytest.mark.libmtl
def test_libmtl_reads_the_same(folder: Path) -> None:
    theirs = load_file("examples/nyu/create_dataset.py").NYUv2(str(folder), "train")
    ours = NYUv2(folder, "train")
    assert len(theirs) == len(ours)
    for mine, other in ((ours[row], theirs[row]) for row in range(len(ours))):
        assert torch.equal(mine[0], other[0])
        assert all(torch.equal(mine[1][task], other[1][task]) for task in other[1])
