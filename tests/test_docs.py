"""The code in the documentation runs, page by page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtl.data import DATASETS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("new_dataset", "new_architecture", "new_strategy", "training")


def _run(page: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    text = (DOCS / f"{page}.md").read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) > 3
    # One module, as the page says: later blocks see what earlier ones defined, at the page's own line numbers.
    names: dict[str, Any] = {"__name__": page}
    for block in blocks:
        before = text[: block.start(1)].count("\n")
        exec(compile("\n" * before + block[1], f"{page}.md", "exec"), names)
    assert "Epoch: 0000 | TRAIN:" in capsys.readouterr().out
    return names


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_new_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(DATASETS)
    try:
        names = _run("new_dataset", capsys)
        assert "blobs" in DATASETS
    finally:
        DATASETS.clear()
        DATASETS.update(before)
    assert names["bundle"].rows == {"train": 64, "test": 32}
    assert names["trainer"].meter.results["size"][0] <= names["trainer"].meter.results["size"][1]


def test_new_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    names = _run("new_architecture", capsys)
    trainer = names["train"](names["FastResidual"], "EW")
    assert trainer.model.splits
    assert not names["train"](names["Residual"], "EW").model.splits
    assert len(names["train"](names["Mixture"], "EW", experts=4).model.experts) == 4


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    names = _run("training", capsys)
    assert names["trainer"].model.loss_fn["size"].log_variance.item() != 0


def test_new_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    names = _run("new_strategy", capsys)
    assert (names["weights"] > 0).all()
    assert not names["trainer"].step.is_foreign
    assert names["by_hand"].step.is_foreign
