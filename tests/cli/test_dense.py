"""Dense tasks from the command line: rooms are made, trained on and evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastmtl.cli import main
from tests.data.test_office import make_office

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "rooms"
    assert main(f"data make rooms --path {folder} --train 5 --test 2 --size 32 40 --seed 3".split()) == 0
    return folder


def test_data_are_made_where_they_are_asked_for(rooms: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert np.load(rooms / "train" / "normal" / "4.npy").shape == (32, 40, 3)
    assert len(list((rooms / "val" / "image").iterdir())) == 2
    assert main(f"data make rooms --path {rooms} --train 5 --test 2 --size 32 40 --seed 3".split()) == 0
    assert f"5 + 2 scenes of 32 x 40 in {rooms}, 0 of them new" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("data make room", "error: Unknown data set to make 'room'. Did you mean 'rooms'?"),
        ("data make rooms --train 0 --path new", "error: train must be at least 1, got 0."),
        ("train --dataset nyuv2", "error: The data set nyuv2 is not in the package: give its folder as dataset_path."),
        ("train --dataset rooms --dataset-path .", "error: '.' must hold train and val, each with image, label, depth"),
        ("train --dataset office-31 --dataset-path .", "error: The list of images 'data_txt/office-31/amazon_train"),
    ],
)
def test_mistakes_are_one_sentence(
    line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert capsys.readouterr().err.startswith(sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_mtan_with_mgda_trains_on_rooms(rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    line = f"train --dataset rooms --dataset-path {rooms} --arch mtan --weighting mgda --encoder conv --aug"
    assert main([*line.split(), "--batch-size", "2", "--device", "cpu", "--run-dir", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "segmentation_LOSS mIoU pixAcc | depth_LOSS abs_err rel_err | normal_LOSS mean median" in shown
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["aug"], config["batch_size"], config["test_batch_size"]) == (True, 2, 32)
    assert main(["eval", str(run)]) == 0
    assert "2 test rows of rooms" in capsys.readouterr().out
    assert main(["eval", str(run), "--split", "val"]) == 2
    assert "split must be test for rooms: it has no val split" in capsys.readouterr().err


def test_a_run_with_augmentation_goes_on_exactly(rooms: Path, tmp_path: Path) -> None:
    line = f"train --dataset rooms --dataset-path {rooms} --weighting ew --encoder conv --aug --batch-size 2 --no-plot"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*line.split(), "--device", "cpu", "--epochs", "2", "--run-dir", str(whole)]) == 0
    assert main([*line.split(), "--device", "cpu", "--epochs", "1", "--run-dir", str(parts)]) == 0
    assert main(["train", "--resume", str(parts), "--epochs", "2"]) == 0
    first, second = (torch.load(run / "last.pt", weights_only=False)["model"] for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_office_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_office(tmp_path / "office", "office-31")
    line = f"train --dataset office-31 --dataset-path {tmp_path}/office --batch-size 2 --limit-batches 1 --no-plot"
    assert main([*line.split(), "--weighting", "pcgrad", "--device", "cpu", "--run-dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "Multi_Input: True" in shown
    assert "amazon_LOSS Acc | dslr_LOSS Acc | webcam_LOSS Acc" in shown
