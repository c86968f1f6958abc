"""Data sets of the user's that do not work are reported in one sentence, with file and line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmtl.cli import main

HEAD = """import torch
from torch.utils.data import Dataset

from fastmtl.data import DatasetInfo, classes, regression, segmentation


class Rows(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, row):
        return image(row), {"kind": 1, "b": label(row)}


def load_splits(options):
    return splits(options)


def image(row):
    return torch.rand(3, 32, 32)


def label(row):
    return torch.ones(1)


def splits(options):
    return options.splits(train=Rows(), test=Rows())


def tasks():
    return {"kind": classes(2), "b": regression()}


def make():
    return DatasetInfo(tasks=tasks(), load_splits=load_splits)


"""
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def train(body: str, *flags: str, then: Callable[[], str] | None = None) -> str:
        (tmp_path / "mine.py").write_text(HEAD + body)
        small = ["--encoder", "conv", "--batch-size", "16", "--limit-batches", "1"]
        code = main(
            ["train", "--dataset", "./mine.py:make", *small, "--no-plot", "--no-tensorboard", "--device", "cpu", *flags]
        )
        if then is not None:
            return then()
        said = capsys.readouterr().err.strip()
        return said.splitlines()[-1].removeprefix("error: ") if code else ""

    return train


def test_the_data_set_works_without_a_mistake(run: Run) -> None:
    assert run("") == ""


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("def tasks():\n    return {}\n", "mine.py:15: The data set mine has no tasks: give it tasks="),
        (
            "def tasks():\n    return {'kind': 'classes'}\n",
            "mine.py:15: The task kind of the data set mine must be made by classes, binary, regression, segmentation, "
            "depth or normals of fastmtl.data, it is a str.",
        ),
        (
            "def tasks():\n    return {'kind': classes(2), 'b': segmentation(3)}\n",
            "mine.py:15: The task b of the data set mine predicts maps, whose size it must say: "
            "options.splits(..., image_size=(height, width)).",
        ),
        ("def splits(options):\n    pass\n", "mine.py:15: load_splits of the data set mine must return Splits, as "),
        (
            "def make(folder):\n    return None\n",
            "mine.py:39: the data set make must be a DatasetInfo of fastmtl.data or a function without arguments that "
            "returns one, it takes arguments.",
        ),
    ],
)
def test_a_description_that_cannot_be(run: Run, body: str, sentence: str) -> None:
    assert run(body).startswith(sentence)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "def label(row):\n    return None\n",
            "mine.py:7: The labels of b of a batch cannot be joined, as they must be tensors of one shape: they are "
            "None.",
        ),
        (
            "def image(row):\n    return torch.rand(3, 32, 32 + row % 2)\n",
            "mine.py:7: The inputs of a batch cannot be joined, as they must be tensors of one shape: they are tensors "
            "of shape (3, 32, 32), tensors of shape (3, 32, 33).",
        ),
        (
            "class Some(Rows):\n    def __getitem__(self, row):\n        image, labels = super().__getitem__(row)\n"
            "        return image, labels if row % 2 else {'kind': 1}\n\n\nRows = Some\n",
            "mine.py:39: Some rows of a batch have no label of b, others have: a missing one is NaN, or -100 for a "
            "class.",
        ),
    ],
)
def test_rows_that_make_no_batch(run: Run, body: str, sentence: str) -> None:
    assert run(body) == sentence


# Dynamo looks at the traceback's tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", [(), ("--compile",)], ids=["eager", "compiled"])
def test_labels_that_do_not_fit_the_loss(run: Run, compiled: tuple[str, ...]) -> None:
    said = run("def label(row):\n    return torch.ones(2)\n", *compiled)
    assert said.startswith(
        "mine.py:7: Task b: MSELoss: predictions of shape (16, 1) do not match labels of shape (16, 2)"
    )


def test_a_class_that_there_is_not(run: Run) -> None:
    said = run("def tasks():\n    return {'kind': classes(2), 'b': classes(2)}\n\n\ndef label(row):\n    return 7\n")
    assert said.startswith("mine.py:7: Task b: CELoss: labels must be from 0 to 1 for predictions of shape (16, 2)")


@pytest.mark.parametrize(
    ("image", "form", "encoder"),
    [
        ("torch.rand(1, 32, 32)", "float32 of shape (16, 1, 32, 32)", "conv"),
        ("torch.ones(3, 32, 32, dtype=torch.uint8)", "uint8 of shape (16, 3, 32, 32)", "./mine.py:network"),
    ],
)
def test_inputs_that_the_encoder_cannot_read(run: Run, image: str, form: str, encoder: str) -> None:
    network = (
        "from torch import nn\n\n\ndef network():\n    made = nn.Sequential(nn.Conv2d(3, 4, 3))\n"
        "    made.feature_dim = 4\n    return made\n\n\n"
    )
    said = run(f"{network}def image(row):\n    return {image}\n", "--encoder", encoder)
    name = "ConvEncoder" if encoder == "conv" else "Sequential of mine.py:42"
    assert said.startswith(f"mine.py:7: The inputs of the data set, {form}, do not fit the encoder, {name}: ")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("[(torch.rand(1, 32, 32), {'kind': 1, 'b': torch.ones(1)})] * 32", "The inputs of the data set, float32 of "),
        (
            "torch.utils.data.TensorDataset(torch.rand(32, 3, 32, 32), torch.ones(32))",
            "The labels of a batch must be a dictionary by task, got Tensor.",
        ),
    ],
)
def test_rows_in_a_list_are_known_by_the_function_that_made_them(run: Run, rows: str, sentence: str) -> None:
    said = run(f"def splits(options):\n    rows = {rows}\n    return options.splits(train=rows, test=rows)\n")
    assert said.startswith(f"mine.py:15: {sentence}")


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ("torch.tensor([1.0 + row % 2])", "got 2; a missing one is NaN."),
        ("torch.tensor([2 * (row % 2) - 1])", "got -1; a missing one is -100."),
        ("torch.tensor([0.5 if row % 2 else float('nan')])", ""),
        ("torch.tensor([1 if row % 2 else -100])", ""),
    ],
)
def test_binary_labels_that_there_are_not(run: Run, labels: str, sentence: str) -> None:
    of_tasks = "from fastmtl.data import binary\n\n\ndef tasks():\n    return {'kind': classes(2), 'b': binary()}\n"
    said = run(f"{of_tasks}\n\ndef label(row):\n    return {labels}\n", "--metric", "b=l1")
    assert said == (sentence and f"mine.py:7: Task b: binary labels must be 0 or 1, or between them, {sentence}")


@pytest.mark.parametrize("arch", ["MTAN", "PLE", "LTB", "Cross_stitch"])
def test_a_network_without_stages_is_known_by_the_function_that_made_it(run: Run, arch: str) -> None:
    network = "def network():\n    made = torch.nn.Flatten()\n    made.feature_dim = 3072\n    return made\n"
    said = run(network, "--encoder", "./mine.py:network", "--arch", arch)
    assert said.startswith(f"mine.py:39: {arch} needs an encoder made of stages")


def test_labels_and_loss_of_the_user_name_the_loss(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my_loss.py").write_text(
        "from fastmtl.errors import UsageError\nfrom fastmtl.loss import AbsLoss\n\n\nclass Mine(AbsLoss):\n"
        "    def compute_loss(self, pred, gt):\n        raise UsageError('Not these labels.')\n"
    )
    assert run("", "--loss", "b=./my_loss.py:Mine") == "my_loss.py:7: Task b: Not these labels."


def test_a_task_without_labels_is_told_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    body = "def label(row):\n    return torch.full((1,), float('nan'))\n"
    said = run(body, "--epochs", "2", then=lambda: capsys.readouterr().out)
    told = [line for line in said.splitlines() if line.startswith("No label")]
    assert told == [
        "No label of b was seen in the first epoch: the task is not trained, and - stands for its losses and scores"
    ]


def test_warnings_are_a_sentence_each(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    # As they are shown; pytest takes those that are given.
    shown = "print(warnings.formatwarning('Once\\nmore. (Triggered internally at a.cpp:3.)', UserWarning, 'a.py', 3))"
    before = warnings.formatwarning
    body = f"import warnings\n\n\ndef image(row):\n    {shown}\n    return torch.rand(3, 32, 32)\n"
    said = run(body, then=lambda: capsys.readouterr().out)
    assert "warning: Once more.\n" in said
    assert "Triggered" not in said
    assert warnings.formatwarning is before
