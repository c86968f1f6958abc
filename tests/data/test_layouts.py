"""Data sets from folders in the layouts of archives and of LibMTL's examples: what is read, and what is refused."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmtl.cli import main
from fastmtl.data import DataBundle, load
from fastmtl.data.celeba import ATTRIBUTES, AttributeF1, CelebA
from fastmtl.data.collate import join_inputs
from fastmtl.data.nyuv2 import Cityscapes
from fastmtl.data.pawsx import LANGUAGES, SentencePairs
from fastmtl.errors import UsageError
from fastmtl.model.segnet import SegNet_MTAN_encoder

SIZE = (16, 32)


def _cityscapes(root: Path, label: str = "label") -> Path:
    rng = np.random.default_rng(0)
    for split, rows in (("train", 4), ("val", 2)):
        for kind, shape in (("image", (*SIZE, 3)), (label, SIZE), ("depth", (*SIZE, 1))):
            (root / split / kind).mkdir(parents=True)
            for row in range(rows):
                values = rng.integers(-1, 7, shape).astype(float) if kind == label else rng.uniform(0.1, 1, shape)
                np.save(root / split / kind / f"{row}.npy", values)
    return root


@pytest.mark.parametrize("label", ["label", "label_7"])
def test_cityscapes_rows_are_the_files(tmp_path: Path, label: str) -> None:
    rows = Cityscapes(_cityscapes(tmp_path, label))
    assert (len(rows), len(Cityscapes(tmp_path, "test"))) == (4, 2)
    image, labels = rows[3]
    assert list(labels) == ["segmentation", "depth"]
    for kind, found in ((label, labels["segmentation"]), ("depth", labels["depth"]), ("image", image)):
        wanted = torch.from_numpy(np.load(tmp_path / "train" / kind / "3.npy")).float()
        torch.testing.assert_close(found, wanted.movedim(-1, 0) if wanted.ndim == 3 else wanted)


def test_cityscapes_is_changed_at_random_all_maps_alike(tmp_path: Path) -> None:
    _cityscapes(tmp_path)
    for split in ("train", "val"):
        for path in (tmp_path / split / "image").iterdir():
            depth = np.load(tmp_path / split / "depth" / path.name)
            np.save(path, depth.repeat(3, 2))
    torch.manual_seed(0)
    rows = Cityscapes(tmp_path, augmentation=True)
    changed = [rows[index % 4] for index in range(16)]
    flipped = sum(
        torch.equal(
            image,
            torch.from_numpy(np.load(tmp_path / "train/image" / f"{index % 4}.npy")).float().movedim(-1, 0).flip(-1),
        )
        for index, (image, _) in enumerate(changed)
    )
    assert flipped > 0
    for image, labels in changed:
        # Where nothing was enlarged, image and depth still agree.
        if torch.equal(image[0], image[1]) and (image[:1] - labels["depth"]).abs().max() < 1e-6:
            break
    else:
        raise AssertionError("image and depth never agree")


def test_cityscapes_trains_by_its_recipe_with_a_small_network(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        "train",
        "--recipe",
        "cityscapes",
        "--scale",
        "small",
        "--dataset-path",
        str(_cityscapes(tmp_path / "data")),
    ]
    small = [
        "--train-size",
        "4",
        "--batch-size",
        "2",
        "--epochs",
        "1",
        "--encoder",
        "conv",
        "--encoder-args",
        "channels=3",
    ]
    assert main([*command, *small, "--weighting", "mgda", "--run-dir", str(run), "--no-plot", "--no-tensorboard"]) == 0


def test_segnet_mtan_gives_each_task_its_features(tmp_path: Path) -> None:
    bundle = load(
        "cityscapes", path=_cityscapes(tmp_path), batch_size=2, encoder="segnet-mtan", encoder_args={"task_num": 2}
    )
    encoder = bundle.encoder_class()
    assert isinstance(encoder, SegNet_MTAN_encoder)
    images = next(iter(bundle.train))[0]
    features = encoder(torch.nn.functional.pad(images, (0, 0, 0, 16)))
    assert [part.shape for part in features] == [(2, 64, 32, 32)] * 2
    decoders = bundle.decoders()
    assert decoders["segmentation"](features[0]).shape == (2, 7, *SIZE)
    assert decoders["depth"](features[1]).shape == (2, 1, *SIZE)


def test_cityscapes_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must hold train and val, each with image, label and depth, but has no"):
        Cityscapes(tmp_path)
    _cityscapes(tmp_path)
    np.save(tmp_path / "train" / "label" / "0.npy", np.full(SIZE, 12.0))
    with pytest.raises(UsageError, match="classes 0 to 6"):
        Cityscapes(tmp_path)[0]


def _celeba(root: Path, archive: bool = False) -> Path:
    rng = np.random.default_rng(0)
    images, attributes, parts = (root / name if archive else root for name in ("Img", "Anno", "Eval"))
    (images / "img_align_celeba").mkdir(parents=True)
    for folder in (attributes, parts):
        folder.mkdir(exist_ok=True)
    names = [f"{number:06d}.jpg" for number in range(1, 13)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (22, 18, 3), dtype=np.uint8)).save(images / "img_align_celeba" / name)
    lines = [f"{name} {' '.join(rng.choice(['1', '-1'], 40))}" for name in names]
    (attributes / "list_attr_celeba.txt").write_text("\n".join([str(len(names)), " ".join(ATTRIBUTES), *lines]) + "\n")
    of = [0] * 8 + [1] * 2 + [2] * 2
    (parts / "list_eval_partition.txt").write_text(
        "".join(f"{name} {part}\n" for name, part in zip(names, of, strict=True))
    )
    return root


@pytest.mark.parametrize("archive", [False, True])
def test_celeba_follows_its_partition(tmp_path: Path, archive: bool) -> None:
    splits = {
        split: CelebA(_celeba(tmp_path, archive) if split == "train" else tmp_path, split)
        for split in ("train", "val", "test")
    }
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 8, "val": 2, "test": 2}
    image, labels = splits["val"][1]
    assert image.shape == (3, 64, 64)
    assert image.max() <= 1
    line = next(
        line
        for line in next(tmp_path.rglob("list_attr_celeba.txt")).read_text().splitlines()
        if line.startswith("000010.jpg")
    )
    assert [int(label) for label in labels.values()] == [int(value == "1") for value in line.split()[1:]]


def test_celeba_trains_forty_tasks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", "--dataset", "celeba", "--dataset-path", str(_celeba(tmp_path / "data")), "--encoder", "conv"]
    assert main([*command, "--batch-size", "4", "--weighting", "famo", "--run-dir", str(run), "--no-plot"]) == 0
    assert "Wearing_Lipstick" in (run / "metrics.jsonl").read_text()


def test_the_f1_score_of_an_attribute_is_that_of_its_yes() -> None:
    metric = AttributeF1()
    metric.update_fun(torch.tensor([[0.3], [-2.0], [0.1]]), torch.tensor([[1.0], [1.0], [0.0]]))
    metric.update_fun(torch.tensor([[5.0], [9.0]]), torch.tensor([[1.0], [float("nan")]]))
    assert metric.score_fun() == [pytest.approx(2 * 2 / (2 * 2 + 1 + 1))]


def test_celeba_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="img_align_celeba is neither there nor in Img"):
        CelebA(tmp_path)
    file = _celeba(tmp_path) / "list_attr_celeba.txt"
    text = file.read_text()
    file.write_text(text[: len(text) // 2 + 20])
    with pytest.raises(UsageError, match=r"Line \d+ of .* 40 values of 1 or -1: is it whole"):
        CelebA(tmp_path)
    file.write_text(text.replace("Attractive", "Nice"))
    with pytest.raises(UsageError, match=r"Line 2 .* must name CelebA's 40 attributes"):
        CelebA(tmp_path)
    file.write_text(text)
    (tmp_path / "img_align_celeba" / "000001.jpg").write_bytes(b"half")
    with pytest.raises(UsageError, match="cannot be read"):
        CelebA(tmp_path)[0]


def _pawsx(root: Path, archive: bool = False) -> Path:
    for language in LANGUAGES:
        for split, archived in (("train", "train"), ("dev", "dev_2k"), ("test", "test_2k")):
            path = root / language / f"{archived}.tsv" if archive else root / f"{split}-{language}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            start = [["id"]] if archive else [[]]
            lines = [[*start[0], "sentence1", "sentence2", "label"]]
            for row in range(8):
                first = f'"{language} the cat {row} sat'
                lines.append([*([str(row)] if archive else []), first, f"{split} a dog {row}", str(row % 2)])
            path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return root


@pytest.mark.parametrize("archive", [False, True])
def test_pawsx_rows_are_the_pairs(tmp_path: Path, archive: bool) -> None:
    rows = SentencePairs(_pawsx(tmp_path, archive), "de", "val")
    assert len(rows) == 8
    assert rows[3] == (('"de the cat 3 sat', "dev a dog 3"), 1)


def test_pairs_are_tokenized_as_pairs() -> None:
    seen: list[Any] = []

    def tokenize(texts: Any) -> dict[str, Tensor]:
        seen.extend(texts)
        return {"input_ids": torch.zeros(len(texts), 3)}

    assert join_inputs([("a", "b"), ("c", "d")], tokenize)["input_ids"].shape == (2, 3)
    assert seen == [("a", "b"), ("c", "d")]


def test_pawsx_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has neither train-en\.tsv nor en/train\.tsv"):
        SentencePairs(tmp_path, "en", "train")
    _pawsx(tmp_path)
    with pytest.raises(UsageError, match="needs an encoder of texts"):
        load("pawsx", path=tmp_path, encoder="conv")
    file = tmp_path / "train-en.tsv"
    file.write_text(file.read_text() + "one\ttwo\n")
    with pytest.raises(UsageError, match=r"Line 10 of .* must be two sentences and 0 or 1"):
        SentencePairs(tmp_path, "en", "train")
    file.write_text("")
    with pytest.raises(UsageError, match="is empty"):
        SentencePairs(tmp_path, "en", "train")


def _idx(folder: Path, first: int) -> Path:
    """Write files of Fashion-MNIST's form whose images are grey, by class."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", 5040), ("t10k", 30)):
        labels = (np.arange(rows) % 10).astype(np.uint8)
        images = np.broadcast_to((labels + first)[:, None, None], (rows, 28, 28)).astype(np.uint8)
        for kind, values, magic in (("images-idx3", images, 3), ("labels-idx1", labels, 1)):
            head = bytes((0, 0, 8, magic)) + b"".join(int(size).to_bytes(4, "big") for size in values.shape)
            with gzip.open(folder / f"{name}-{kind}-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(head + values.tobytes())
    return folder


def _first(bundle: DataBundle) -> tuple[Tensor, dict[str, Tensor]]:
    loader: Any = bundle.train
    images, labels = next(iter(loader))
    return images, labels


def test_multi_fashion_mnist_has_clothes_left_and_digits_right(tmp_path: Path) -> None:
    _idx(tmp_path, first=10)
    _idx(tmp_path / "mnist", first=60)
    bundle = load("multi-fashion-mnist", path=tmp_path, batch_size=32, n_train=64, encoder="lenet")
    images, labels = _first(bundle)
    pixels = ((images[:, 0] * 0.3081 + 0.1307) * 255).round()
    # Left above nothing of the right one's, and below it where they overlap.
    assert torch.equal(pixels[:, 4, 4], 10.0 + labels["left"])
    assert torch.equal(pixels[:, 16, 16], 60.0 + labels["right"])
    assert bundle.decoders()["left"](bundle.encoder_class()(images)).shape == (32, 10)
    shutil.rmtree(tmp_path / "mnist")
    own, _ = _first(load("multi-fashion-mnist", path=tmp_path, batch_size=32, n_train=64))
    assert not torch.equal(own, images)


def test_multifashion_has_clothes_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = _first(load("multifashion", path=_idx(tmp_path, first=10), batch_size=32, n_train=64))
    pixels = ((images[:, 0] * 0.3081 + 0.1307) * 255).round()
    assert torch.equal(pixels[:, 16, 16], 10.0 + torch.maximum(labels["left"], labels["right"]))
    monkeypatch.setattr("fastmtl.data.multimnist_sets.FASHION", tmp_path / "none")
    with pytest.raises(UsageError, match="install Debian's package dataset-fashion-mnist"):
        load("multifashion")
