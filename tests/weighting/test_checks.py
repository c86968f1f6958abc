"""Strategies of the user's that cannot work are refused in one sentence, with file and line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmtl.cli import main

HEAD = """import torch

from fastmtl.weighting import AbsWeighting, Weights


class Mine(AbsWeighting):
    needs = "gram"

"""
SMALL = ["--encoder", "conv", "--train-size", "48", "--batch-size", "16", "--limit-batches", "2"]
QUIET = ["--no-plot", "--no-tensorboard", "--device", "cpu"]

Run = Callable[[str], str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def train(body: str) -> str:
        (tmp_path / "mine.py").write_text(HEAD + body)
        code = main(["train", "--weighting", "./mine.py:Mine", *SMALL, *QUIET])
        said = capsys.readouterr().err.strip()
        return said.splitlines()[-1] if code else ""

    return train


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ("Weights(shared=torch.ones(3))", "tensor of shape (2,), it returned one of shape (3,)."),
        ("Weights(shared=torch.ones(1, 2))", "tensor of shape (2,), it returned one of shape (1, 2)."),
        ("Weights(shared=torch.ones(2, dtype=torch.int64))", "tensor of shape (2,), it returned one of int64."),
        ("Weights(shared=[1.0, 1.0])", "tensor of shape (2,), it returned a list."),
        ("Weights(shared=losses.numpy())", "tensor of shape (2,), it returned a ndarray."),
        ("torch.ones(2)", "must return Weights(shared=...) of fastmtl.weighting, it returned a Tensor."),
        ("None", "must return Weights(shared=...) of fastmtl.weighting, it returned nothing."),
        ("Weights(shared=torch.ones(2), heads=torch.ones(2))", "for which its class must say weighs_heads = True."),
    ],
)
def test_what_is_no_weights_is_refused(run: Run, returned: str, sentence: str) -> None:
    said = run(f"    def weigh(self, losses, gram, **hyper):\n        return {returned}\n")
    assert said.startswith("error: mine.py:9: Mine.weigh ")
    assert said.endswith(sentence)


def test_weights_that_are_not_finite_name_their_rule(run: Run) -> None:
    said = run("    def weigh(self, losses, gram, **hyper):\n        return Weights(shared=losses * torch.nan)\n")
    assert "from Mine.weigh (mine.py:9) became NaN or infinite in training step 0" in said


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "    def weigh(self, losses):\n        pass\n",
            "mine.py:9: Mine.weigh must take (self, losses, gram, **hyper): ",
        ),
        ("    pass\n", "mine.py:6: Mine must override weigh, the method that belongs to needs = 'gram'."),
        ("    needs = 'rows'\n", "mine.py:6: Mine must override weigh_rows, "),
        ("    needs = 'grams'\n", "mine.py:6: needs of Mine must be one of 'losses', 'gram', "),
    ],
)
def test_a_class_that_cannot_be_a_rule_is_refused(run: Run, body: str, sentence: str) -> None:
    assert run(body).startswith(f"error: {sentence}")


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("pass", "mine.py:9: Mine.backward has given no parameter a gradient: "),
        (
            'self._backward_new_grads(torch.ones(3), grads=self._get_grads(losses, mode="backward"))',
            "mine.py:10: _backward_new_grads takes a weight for each of 2 tasks, got 3.",
        ),
        (
            "losses.sum().backward()\n        return torch.ones(3).numpy()",
            "mine.py:9: Mine.backward must return one weight for each of 2 tasks, or None, got the shape (3,).",
        ),
    ],
)
def test_a_backward_that_gives_no_update_is_refused(run: Run, lines: str, sentence: str) -> None:
    assert run(f"    def backward(self, losses, **kwargs):\n        {lines}\n").startswith(f"error: {sentence}")


def test_a_rule_that_fits_trains(run: Run) -> None:
    assert run("    def weigh(self, losses, gram, *, extra=1, **hyper):\n        return Weights(shared=losses)\n") == ""
